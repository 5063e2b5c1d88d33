"""What is changed in a template's syntax tree and in the code that jinja2 generates of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from types import CodeType
from typing import Any

import jinja2
import jinja2.nodes as nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, Macro, TemplateReference
from jinja2.visitor import NodeTransformer

from lowtide.models.template.traced_text import concatenated, escape_text, mark_safe


class GenerationTag(Extension):
    """`{% generation %}` around an answer, which marks it for training: here it is printed as it is."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """Read up to `{% endgeneration %}`."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("printed", lineno=lineno)
        return nodes.CallBlock(call, [], [], body).set_lineno(lineno)

    def printed(self, caller: Callable[[], str]) -> str:
        """Return what the block prints."""
        return caller()


class Limiter(NodeTransformer):
    """Has the environment count every iteration, every literal list and every comparison.

    The calls go to attributes of the environment, which no variable of a template can hide.
    """

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.For:
        """Count the iterations."""
        self.generic_visit(node)
        line = node.lineno
        node.body.insert(0, self._new(nodes.ExprStmt, self._call("tick", [], line), line=line))
        if node.test is not None:
            tick = self._call("tick", [], line)
            node.test = self._new(nodes.And, tick, node.test, line=line)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        """Count the items."""
        return self._nested(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        """Count the items."""
        return self._nested(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        """Count the items."""
        return self._nested(node) if node.ctx == "load" else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        """Count what is compared."""
        self.generic_visit(node)
        node.expr = self._compared(node.expr)
        for operand in node.ops:
            operand.expr = self._compared(operand.expr)
        return node

    def _nested(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return self._call("nested", [node], node.lineno)

    def _compared(self, node: nodes.Expr) -> nodes.Expr:
        constant = isinstance(node, nodes.Const)
        return node if constant else self._call("compared", [node], node.lineno)

    def _call(self, name: str, args: list[nodes.Expr], line: int) -> nodes.Call:
        function = self._new(nodes.EnvironmentAttribute, name, line=line)
        call: nodes.Call = self._new(nodes.Call, function, args, [], None, None, line=line)
        return call

    def _new(self, kind: Callable[..., Any], *fields: Any, line: int) -> Any:
        return kind(*fields, lineno=line, environment=self._environment)


class TracedTemplate(jinja2.Template):
    """A template whose generated code keeps the origin of every character."""

    @classmethod
    def from_code(
        cls,
        environment: jinja2.Environment,
        code: CodeType,
        globals: MutableMapping[str, Any],
        uptodate: Callable[[], bool] | None = None,
    ) -> jinja2.Template:
        """Load the generated code, with functions that trace origins in the place of jinja2's."""
        namespace: dict[str, Any] = {"environment": environment, "__file__": code.co_filename}
        exec(code, namespace)  # what jinja2's own `from_code` does: the code is jinja2's

        def text_of(value: Any) -> str:
            text: str = environment.text_of(value)  # type: ignore[attr-defined]
            return text

        namespace.update(
            Macro=_TracedMacro,
            Markup=mark_safe,
            TemplateReference=_TracedBlocks,
            escape=escape_text,
            markup_join=lambda parts: _joined_markup(list(map(text_of, parts))),
            str_join=lambda parts: environment.concat(list(map(text_of, parts))),
        )
        template = cls._from_namespace(environment, namespace, globals)
        template._uptodate = uptodate
        return template


def _joined_markup(texts: list[str]) -> str:
    """Concatenate, as jinja2's `~` does where it escapes: all or nothing."""
    if not any(hasattr(text, "__html__") for text in texts):
        return concatenated(texts)
    return mark_safe(concatenated(map(escape_text, texts)))


class _TracedMacro(Macro):
    def _invoke(self, arguments: list[Any], autoescape: bool) -> str:
        text: str = self._func(*arguments)
        return mark_safe(text) if autoescape else text


class _TracedBlock(BlockReference):
    def __call__(self) -> str:
        parts: Iterable[str] = self._stack[self._depth](self._context)
        text = concatenated(parts)
        return mark_safe(text) if self._context.eval_ctx.autoescape else text


class _TracedBlocks(TemplateReference):
    """`self` in a template."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._blocks = context

    def __getitem__(self, name: str) -> Any:
        return _TracedBlock(name, self._blocks, self._blocks.blocks[name], 0)
