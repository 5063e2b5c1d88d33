"""Runs a jinja2 template that nobody vouched for, with bounds on what it reaches and makes.

jinja2's sandbox keeps templates away from Python's internals but lets them loop and grow without
end. Here every loop is counted and every operation that can make a long text is measured before it
is done, so that a hostile template costs a sentence, not the memory budget. Knows no chat.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.nodes as nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from lowtide.models.errors import LowtideError, TemplateError

MAX_STEPS = 100_000
"""Loop turns in one rendering."""
MAX_TEXT = 4 << 20
"""Characters that one operation, or the prompt itself, may have."""
MAX_TOTAL_TEXT = 64 << 20
"""Characters that all operations of one rendering may make together."""

FILTERS = frozenset(
    "abs capitalize count d default dictsort e escape first float int items join last length list "
    "lower map max min reject rejectattr replace reverse round safe select selectattr sort string "
    "sum title tojson trim unique upper".split()
)
TEXT_METHODS = frozenset(
    "capitalize casefold count endswith find index isalnum isalpha isdigit islower isspace istitle "
    "isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition "
    "rsplit rstrip split splitlines startswith strip swapcase title upper".split()
)


class _TooMuch(TemplateError):
    """The template passed one of the bounds."""


class _Allowance:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self.steps = 0
        self.text = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise _TooMuch(f"the chat template loops more than {MAX_STEPS:,} times: it is refused")

    def make(self, length: int) -> None:
        self.text += length
        if length > MAX_TEXT or self.text > MAX_TOTAL_TEXT:
            raise _TooMuch(
                f"the chat template makes a text of more than {MAX_TEXT:,} characters: it is refused"
            )


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with an allowance; one per rendering template, never shared."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        self.allowance = _Allowance()
        self.filters = {name: f for name, f in self.filters.items() if name in FILTERS}
        self.filters["replace"] = self._replace
        self.filters["join"] = self._join
        self.globals.clear()
        self.globals.update(
            namespace=jinja2.utils.Namespace,
            dict=dict,
            range=self._range,
            _counted=self._counted,
            _joined=self._joined,
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        bounded: nodes.Template = _Bounder().visit(tree)
        return bounded

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise _TooMuch("the chat template raises to a power: it is refused")
        if operator == "%" and isinstance(left, str):
            raise _TooMuch("the chat template formats with %: it is refused")
        self.allowance.make(_result_length(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str):
            if name not in TEXT_METHODS:
                raise _TooMuch(f"the chat template calls str.{name}: it is refused")
            if name == "replace":
                return self._replace(owner, *args, **kwargs)
            if name == "join":
                return self._join(args[0] if args else (), owner)
            self.allowance.make(len(owner))
        return super().call(context, function, *args, **kwargs)

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        if len(numbers) > MAX_STEPS:
            raise _TooMuch(f"the chat template counts to {len(numbers):,}: it is refused")
        return numbers

    def _counted(self, items: Iterable[Any]) -> list[Any]:
        """Every `for` of the template goes over this list."""
        return list(self._each(items))

    def _each(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.allowance.step()
            yield item

    def _joined(self, *parts: Any) -> str:
        return self._join(parts)

    def _join(self, parts: Iterable[Any], separator: Any = "", attribute: Any = None) -> str:
        if attribute is not None:
            raise _TooMuch("the chat template joins by attribute: it is refused")
        texts = [self._text(part) for part in self._each(parts)]
        glue = self._text(separator)
        self.allowance.make(sum(map(len, texts)) + len(glue) * max(len(texts) - 1, 0))
        return glue.join(texts)

    def _text(self, value: Any) -> str:
        if isinstance(value, (str, int, float, bool, jinja2.Undefined)) or value is None:
            return str(value)
        text = str(value)
        self.allowance.make(len(text))
        return text

    def _replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = str(text), str(old), str(new)
        times = text.count(old) if count is None or count < 0 else min(text.count(old), count)
        self.allowance.make(len(text) + times * len(new))
        replaced: str = text.replace(old, new, times)
        return replaced


class _Bounder(NodeTransformer):
    """Sends every loop and every `~` of a template through the environment's bounded versions."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        if node.recursive:
            raise _TooMuch("the chat template has a recursive loop: it is refused")
        node.iter = _call("_counted", [node.iter], node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call("_joined", node.nodes, node.lineno)


def _call(name: str, args: Sequence[nodes.Node], lineno: int) -> nodes.Call:
    function = nodes.Name(name, "load", lineno=lineno)
    return nodes.Call(function, list(args), [], None, None, lineno=lineno)


def _result_length(operator: str, left: Any, right: Any) -> int:
    if operator == "+":
        return _length(left) + _length(right)
    if operator == "*":
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, (str, list, tuple)) and isinstance(times, int):
                return len(sequence) * max(times, 0)
        if isinstance(left, int) and isinstance(right, int):
            return (left.bit_length() + right.bit_length()) // 8
    return 0


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def compiled(
    source: str,
    *,
    raise_exception: Callable[[str], None],
    strftime_now: Callable[[str], str],
    tojson: Callable[..., str],
) -> jinja2.Template:
    """Compile the template; raise `TemplateError` with the line where it is not one."""
    environment = _BoundedEnvironment()
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    environment.filters["tojson"] = tojson
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template does not parse at line {error.lineno}: {error.message}"
        ) from None
    except (RecursionError, MemoryError):
        raise TemplateError("the chat template is nested too deeply to parse") from None


def rendered(template: jinja2.Template, **variables: Any) -> str:
    """Render with a fresh allowance; every failure is a `TemplateError`."""
    environment = template.environment
    assert isinstance(environment, _BoundedEnvironment)
    environment.allowance = _Allowance()
    pieces, length = [], 0
    try:
        for piece in template.generate(_plain(variables)):
            length += len(piece)
            environment.allowance.make(len(piece))
            if length > MAX_TEXT:
                raise _TooMuch(f"the chat template prints more than {MAX_TEXT:,} characters")
            pieces.append(piece)
    except LowtideError:
        raise
    except RecursionError:
        raise TemplateError("the chat template calls itself without end: it is refused") from None
    except Exception as error:  # the template is somebody else's code: anything can come out
        raise TemplateError(f"the chat template fails: {type(error).__name__}: {error}") from None
    return "".join(itertools.chain(pieces))


def _plain(variables: Mapping[str, Any]) -> dict[str, Any]:
    return dict(variables)
