"""Runs a jinja2 template that nobody vouched for, with bounds on what it reaches and makes.

jinja2's sandbox keeps templates away from Python's internals but lets them loop and grow without
end. Here every loop is counted, every operation that can make a long text is measured before it is
done, and every list is weighed with all that is nested in it, so that a hostile template costs a
sentence, not the memory budget. Knows no chat.

Allowance: how much one rendering of a chat template may still do. Knows no jinja2 syntax."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.nodes as nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from lowtide.models.errors import LowtideError, TemplateError

MAX_SOURCE = 64 << 10
"""Characters of a template; the longest in use have a third of that."""
MAX_STEPS = 100_000
"""Loop turns, and items of lists counted as often as they are nested, in one rendering."""
MAX_TEXT = 4 << 20
"""Characters that one operation, or the prompt itself, may have."""
MAX_TOTAL_TEXT = 64 << 20
"""Characters that all operations of one rendering may read and make together."""


class TooMuch(TemplateError):
    """The template passed one of the bounds, or asked for what none allows."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the chat template {what}: it is refused")


class Allowance:
    """Counts what a rendering does; raises `TooMuch` before what would pass a bound is done."""

    def __init__(self) -> None:
        self._steps = 0
        self._text = 0

    def step(self) -> None:
        """Count a turn of a loop."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise TooMuch(f"loops or nests more than {MAX_STEPS:,} times")

    def make(self, length: int) -> None:
        """Count a text of `length` characters."""
        self._text += length
        if length > MAX_TEXT or self._text > MAX_TOTAL_TEXT:
            raise TooMuch(f"makes a text of more than {MAX_TEXT:,} characters")

    def weigh(self, value: Any) -> None:
        """Count every item that printing or comparing the value would visit."""
        waiting = [value]
        while waiting:
            self.step()
            item = waiting.pop()
            if isinstance(item, str):
                self.make(len(item))
            elif isinstance(item, Mapping):
                waiting += item.values()
            elif isinstance(item, (list, tuple, set, frozenset)):
                waiting += item
            elif type(item).__name__ == "Namespace":
                raise TooMuch("prints or nests a namespace")


FILTERS = frozenset(
    "abs count d default dictsort first float int items join last length list map max min reject "
    "rejectattr replace reverse round safe select selectattr sort sum tojson unique".split()
)
TEXT_FILTERS = frozenset("capitalize e escape lower string title trim upper".split())
TEXT_METHODS = frozenset(
    "capitalize casefold count endswith find index isalnum isalpha isdigit islower isspace istitle "
    "isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition "
    "rsplit rstrip split splitlines startswith strip swapcase title upper".split()
)
METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (str, TEXT_METHODS),
    (dict, frozenset({"get", "items", "keys", "values"})),
    (list, frozenset({"count", "index"})),
    (tuple, frozenset({"count", "index"})),
    (int, frozenset()),
    (float, frozenset()),
    (bytes, frozenset()),
)
"""What may be called on plain values; everything else that they have is not there."""


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with an allowance; one for each template, never shared."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
            finalize=self._weighed,
        )
        self.allowance = Allowance()
        charged = {name: self.charged(self.filters[name]) for name in TEXT_FILTERS}
        kept = {name: self.filters[name] for name in FILTERS if name in self.filters}
        self.filters = {**kept, **charged, "replace": self._replace, "join": self._join}
        self.globals.clear()
        self.globals.update(
            namespace=jinja2.utils.Namespace,
            dict=lambda *args, **kwargs: self._weighed(dict(*args, **kwargs)),
            range=self._range,
            _counted=self._counted,
            _joined=lambda *parts: self._join(parts),
            _weighed=self._weighed,
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        bounded: nodes.Template = _Bounder().visit(tree)
        return bounded

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in METHODS:
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Texts have no `format` here: a width in it can ask for any amount of memory."""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise TooMuch("raises to a power")
        if operator == "%" and isinstance(left, str):
            raise TooMuch("formats with %")
        self.allowance.make(_result_length(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        component, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(component, str):
            if name == "replace":
                return self._replace(component, *args, **kwargs)
            if name == "join":
                return self._join(args[0] if args else (), component)
            self.allowance.make(len(component))
        return super().call(context, function, *args, **kwargs)

    def charged(self, text_filter: Callable[..., Any]) -> Callable[..., Any]:
        """Return the filter with its arguments weighed before it reads them."""

        @functools.wraps(text_filter)
        def weighing(*args: Any, **kwargs: Any) -> Any:
            self.allowance.weigh([a for a in args if not isinstance(a, jinja2.Environment)])
            return text_filter(*args, **kwargs)

        return weighing

    def _weighed(self, value: Any) -> Any:
        """Every printed value, and every list and dict that the template writes down, comes by."""
        self.allowance.weigh(value)
        return value

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        if len(numbers) > MAX_STEPS:
            raise TooMuch(f"counts to {len(numbers):,}")
        return numbers

    def _counted(self, items: Iterable[Any]) -> list[Any]:
        """Every `for` of the template goes over this list."""
        return list(self._each(items))

    def _each(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.allowance.step()
            yield item

    def _join(self, parts: Iterable[Any], separator: Any = "", attribute: Any = None) -> str:
        if attribute is not None:
            raise TooMuch("joins by attribute")
        texts = [self._text(part) for part in self._each(parts)]
        glue = self._text(separator)
        self.allowance.make(sum(map(len, texts)) + len(glue) * max(len(texts) - 1, 0))
        return glue.join(texts)

    def _replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = self._text(text), self._text(old), self._text(new)
        found: int = text.count(old)
        times = found if count is None or count < 0 else min(found, count)
        self.allowance.make(len(text) + times * len(new))
        replaced: str = text.replace(old, new, times)
        return replaced

    def _text(self, value: Any) -> str:
        return value if isinstance(value, str) else str(self._weighed(value))


class _Bounder(NodeTransformer):
    """Sends every loop, every `~` and every list of a template through the bounded versions."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        if node.recursive:
            raise TooMuch("has a recursive loop")
        node.iter = _call("_counted", [node.iter], node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call("_joined", node.nodes, node.lineno)

    def visit_List(self, node: nodes.List) -> nodes.Call:
        self.generic_visit(node)
        return _call("_weighed", [node], node.lineno)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Call:
        self.generic_visit(node)
        return _call("_weighed", [node], node.lineno)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _call("_weighed", [node], node.lineno) if node.ctx == "load" else node


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
    functions: Mapping[str, Callable[..., Any]],
    tojson: Callable[..., str],
) -> jinja2.Template:
    """Compile the template, with `functions` in its reach.

    Raises `TemplateError`, with the line, where it is no template.
    """
    if len(source) > MAX_SOURCE:
        raise TooMuch(f"has {len(source):,} characters, {MAX_SOURCE:,} are allowed")
    environment = _BoundedEnvironment()
    environment.globals.update(functions)
    environment.filters["tojson"] = environment.charged(tojson)
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
    environment.allowance = Allowance()
    pieces, length = [], 0
    try:
        for piece in template.generate(variables):
            length += len(piece)
            if length > MAX_TEXT:
                raise TooMuch(f"prints more than {MAX_TEXT:,} characters")
            pieces.append(piece)
    except LowtideError:
        raise
    except RecursionError:
        raise TooMuch("calls itself without end") from None
    except Exception as error:  # the template is somebody else's code: anything can come out
        raise TemplateError(f"the chat template fails: {type(error).__name__}: {error}") from None
    return "".join(pieces)
