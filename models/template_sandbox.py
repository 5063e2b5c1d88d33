"""Runs an untrusted jinja2 template with limits on what it reaches, how long it runs and how much it makes.

jinja2's sandbox keeps templates away from Python's internals but lets them loop and grow without end. Here
every loop is counted, every operation that can make a long text is measured before it runs, and every list is
measured with everything nested in it. A hostile template ends with an error, within the memory budget.
"""

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
"""The most characters of a template; the longest in use have a third of that."""
MAX_STEPS = 100_000
"""The most loop iterations and (nested) list items of one rendering."""
MAX_TEXT = 4 << 20
"""The most characters of the result of one operation, and of the prompt."""
MAX_TOTAL_TEXT = 64 << 20
"""The most characters that all operations of one rendering read and make together."""


class TooMuch(TemplateError):
    """The template exceeded one of the limits or used something that is not allowed."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the chat template {what}, which is not allowed")


class Allowance:
    """Counts what one rendering does; raises `TooMuch` before an operation that would exceed a limit."""

    def __init__(self) -> None:
        self._steps = 0
        self._text = 0

    def step(self) -> None:
        """Count a loop iteration."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise TooMuch(f"loops or nests more than {MAX_STEPS:,} times")

    def make(self, length: int) -> None:
        """Count a text of `length` characters."""
        self._text += length
        if length > MAX_TEXT or self._text > MAX_TOTAL_TEXT:
            raise TooMuch(f"makes a text of more than {MAX_TEXT:,} characters")

    def count(self, value: Any) -> None:
        """Count every item that printing or comparing the value would visit."""
        pending = [value]
        while pending:
            self.step()
            item = pending.pop()
            if isinstance(item, str):
                self.make(len(item))
            elif isinstance(item, Mapping):
                pending += item.values()
            elif isinstance(item, (list, tuple, set, frozenset)):
                pending += item
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
"""The methods that may be called on plain values; all other attributes are hidden."""


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with an allowance; each template has its own."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
            finalize=self._measured,
        )
        self.allowance = Allowance()
        charged = {name: self.charged(self.filters[name]) for name in TEXT_FILTERS}
        allowed = {name: self.filters[name] for name in FILTERS if name in self.filters}
        self.filters = {**allowed, **charged, "replace": self._replace, "join": self._join}
        self.globals.clear()
        self.globals.update(
            namespace=jinja2.utils.Namespace,
            dict=lambda *args, **kwargs: self._measured(dict(*args, **kwargs)),
            range=self._range,
            _counted=self._counted,
            _joined=lambda *parts: self._join(parts),
            _measured=self._measured,
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        limited: nodes.Template = _Limiter().visit(tree)
        return limited

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in METHODS:
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Hide `format` of strings: a width in it can request any amount of memory."""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise TooMuch("raises to a power")
        if operator == "%" and isinstance(left, str):
            raise TooMuch("formats with %")
        self.allowance.make(_result_length(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        receiver, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(receiver, str):
            if name == "replace":
                return self._replace(receiver, *args, **kwargs)
            if name == "join":
                return self._join(args[0] if args else (), receiver)
            self.allowance.make(len(receiver))
        return super().call(context, function, *args, **kwargs)

    def charged(self, text_filter: Callable[..., Any]) -> Callable[..., Any]:
        """Return the filter with its arguments counted before it reads them."""

        @functools.wraps(text_filter)
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.allowance.count([a for a in args if not isinstance(a, jinja2.Environment)])
            return text_filter(*args, **kwargs)

        return counting

    def _measured(self, value: Any) -> Any:
        """Count a value; called for every printed value and every list and dict literal."""
        self.allowance.count(value)
        return value

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        if len(numbers) > MAX_STEPS:
            raise TooMuch(f"counts to {len(numbers):,}")
        return numbers

    def _counted(self, items: Iterable[Any]) -> list[Any]:
        """Return the items of a loop as a list, counted; called for every `for`."""
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
        occurrences: int = text.count(old)
        times = occurrences if count is None or count < 0 else min(occurrences, count)
        self.allowance.make(len(text) + times * len(new))
        replaced: str = text.replace(old, new, times)
        return replaced

    def _text(self, value: Any) -> str:
        return value if isinstance(value, str) else str(self._measured(value))


class _Limiter(NodeTransformer):
    """Makes every loop, every `~` and every list literal of a template use the counted versions."""

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
        return _call("_measured", [node], node.lineno)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Call:
        self.generic_visit(node)
        return _call("_measured", [node], node.lineno)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _call("_measured", [node], node.lineno) if node.ctx == "load" else node


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
    """Compile the template; it can call `functions`.

    Raises `TemplateError` with the line where it does not parse.
    """
    if len(source) > MAX_SOURCE:
        raise TooMuch(f"has {len(source):,} characters, more than {MAX_SOURCE:,}")
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
    except Exception as error:  # untrusted code can raise anything
        raise TemplateError(f"the chat template fails: {type(error).__name__}: {error}") from None
    return "".join(pieces)
