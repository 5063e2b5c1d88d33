"""Runs an untrusted jinja2 template with limits on what it reaches, how long it runs and how much it makes.

jinja2's sandbox keeps templates away from Python's internals but lets them loop and grow without end. Here every
call and every loop is counted, every operation that can make a long text is measured before it runs, and every list
is measured with everything nested in it. A hostile template ends with an error, within the memory budget.

What a message brought stays known, character by character (`models/template/traced_text.py`).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.filters
import jinja2.nodes
import jinja2.runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner

from lowtide.models.errors import LowtideError, TemplateError
from lowtide.models.template.allowance import (
    MAX_BITS,
    MAX_SOURCE,
    Allowance,
    TooMuch,
    refuse_namespaces,
)
from lowtide.models.template.filters import (
    DEEP,
    GROWING,
    PASSING,
    REPEATING,
    TextFilters,
    joined,
    replaced,
)
from lowtide.models.template.formatting import TracedFormatter, percent_format
from lowtide.models.template.generated import GenerationTag, Limiter, TracedTemplate
from lowtide.models.template.origin import holds_message
from lowtide.models.template.to_json import to_json
from lowtide.models.template.traced_text import (
    TracedText,
    all_message,
    as_traced,
    concatenated,
    spans_of,
)
from lowtide.models.text.prompt_span import PromptSpan

_PASSING_OBJECTS = (
    jinja2.runtime.Macro,
    jinja2.runtime.BlockReference,
    jinja2.runtime.LoopContext,
    Joiner,
    Cycler,
    dict,
    list,
    tuple,
    GenerationTag,
)
"""Objects whose methods return what they were called with, or what they hold."""
_SCOPES = ("_loop_vars", "_block_vars")
"""What generated code passes to calls, beside their arguments."""
_CONTEXTS = (jinja2.Environment, jinja2.nodes.EvalContext, jinja2.runtime.Context)
_OWN_NAME = f"{TracedText.__module__}.{TracedText.__name__}"
"""How an error names a message's text: to a template it is a `str`."""
_BYTES_METHODS = frozenset("count decode endswith find hex index startswith".split())


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox as transformers sets it up, with an allowance; each template has its own."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    template_class = TracedTemplate
    concat = staticmethod(concatenated)

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
            finalize=self._printed,
        )
        self.allowance = Allowance()
        self.watched: dict[int, Any] = {}
        self.misused = False
        """Whether a value of `watched` was printed as Python writes it, or a text of it as JSON."""
        self.filters.update(tojson=self._to_json, sum=self._sum)
        traced = TextFilters(lambda: self.allowance, self.text_of).by_name()
        self.filters = {
            name: self._counted(
                name, traced.get(name, own), name in PASSING or name in traced or name == "tojson"
            )
            for name, own in self.filters.items()
        }
        self.globals.update(functions)
        self.globals.update(
            dict=lambda *args, **kwargs: self.allowance.nest(dict(*args, **kwargs)),
            lipsum=self._lipsum,
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        limited: jinja2.nodes.Template = Limiter(self).visit(tree)
        return limited

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, bytes) and attr not in _BYTES_METHODS:
            return False
        if attr in ("to_bytes", "from_bytes") and isinstance(obj, int):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return a bounded `format` for that of a string, None for other values."""
        receiver = getattr(value, "__self__", None)
        if not isinstance(receiver, str) or not isinstance(
            value, (types.MethodType, types.BuiltinMethodType)
        ):
            return None
        if value.__name__ not in ("format", "format_map"):
            return None
        formatter = TracedFormatter(self, self.allowance.make, self.text_of)
        return _Format(receiver, formatter, is_map=value.__name__ == "format_map")

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            self.allowance.visit(argument)
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            return percent_format(left, right, self.allowance.make, self.text_of)
        self._charge_binop(operator, left, right)
        if operator == "+" and isinstance(right, TracedText) and isinstance(left, str):
            left = as_traced(left)
        result = super().call_binop(context, operator, left, right)
        return self.allowance.nest(result) if isinstance(result, (list, tuple)) else result

    def _charge_binop(self, name: str, left: Any, right: Any) -> None:
        """Count the result of `+`, `*` or `**` before it is made."""
        if isinstance(left, (int, float)) and isinstance(right, (int, float)):
            if max(_bits(left), 1) * right > MAX_BITS and name == "**":
                raise TooMuch("raises to a large power")
            if _bits(left) + _bits(right) > MAX_BITS:
                raise TooMuch("computes with numbers that are too long")
            return
        length = 0
        if name == "+":
            length = _length(left) + _length(right)
        elif name == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(times, int):
                    length = max(length, _length(sequence) * times)
        if isinstance(left, str) or isinstance(right, str):
            self.allowance.make(length)
        else:
            self.allowance.step(length)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.allowance.step()
        receiver = getattr(function, "__self__", None)
        stated = {name: value for name, value in kwargs.items() if name not in _SCOPES}
        if isinstance(receiver, str) and function.__name__ not in ("format", "format_map"):
            return self._call_text_method(receiver, function.__name__, args, stated)
        if receiver is self:
            return function(*args, **stated)
        result = super().call(context, function, *args, **kwargs)
        if isinstance(function, (*_PASSING_OBJECTS, _Format)) or isinstance(
            receiver, _PASSING_OBJECTS
        ):
            return result
        return self._of_unknown(result, (args, stated, receiver))

    def _of_unknown(self, result: Any, arguments: Any) -> Any:
        """Return what a function that does not trace origins made of its arguments."""
        if not isinstance(result, str) or isinstance(result, TracedText):
            return result
        return all_message(result) if holds_message(arguments) else result

    def _call_text_method(self, text: str, name: str, args: Any, kwargs: Any) -> Any:
        if name == "join" and args:
            return joined(text, args[0], self.allowance)
        if name == "replace" and len(args) > 1:
            count = args[2] if len(args) > 2 else kwargs.get("count", -1)
            return replaced(text, args[0], args[1], count, self.allowance.make)
        self.allowance.make(len(text) + self._growth(text, name, args, kwargs))
        if holds_message((args, kwargs)):
            text = as_traced(text)
        result = getattr(text, name)(*args, **kwargs)
        if name == "translate":  # the table has numbers for characters, and numbers have no origin
            return all_message(result)
        return self.allowance.nest(result) if isinstance(result, (list, tuple)) else result

    def _growth(self, text: str, name: str, args: Any, kwargs: Any) -> int:
        """Return an upper bound of how many characters a method adds."""
        numbers = [number for number in (*args, *kwargs.values()) if isinstance(number, int)]
        if name == "translate" and args and isinstance(args[0], Mapping):
            longest = max(map(_length, args[0].values()), default=0)
            return len(text) * longest
        if name == "expandtabs":
            return text.count("\t") * max([8, *numbers])
        return max(numbers, default=0) if name in ("center", "ljust", "rjust", "zfill") else 0

    def text_of(self, value: Any) -> str:
        """Return `str(value)`, counted. Text of a message inside a list or dict makes all of it the message's."""
        if isinstance(value, str):
            self.allowance.make(len(value))
            return value
        if id(value) in self.watched:
            self.misused = True
        self.allowance.visit(value)
        refuse_namespaces(value)
        text = str(value)
        self.allowance.make(len(text))
        return all_message(text) if holds_message(value) else text

    def _printed(self, value: Any) -> str:
        return self.text_of(value)

    def _to_json(self, value: Any, *args: Any, **kwargs: Any) -> str:
        if self.watched and any(isinstance(v, str) and id(v) in self.watched for v in _all(value)):
            self.misused = True
        return to_json(value, *args, **kwargs)

    def _counted(self, name: str, own: Callable[..., Any], traces: bool) -> Callable[..., Any]:
        """Return the filter with its arguments counted before it reads them, and its result."""

        @functools.wraps(own)
        def counted(*args: Any, **kwargs: Any) -> Any:
            values = [arg for arg in (*args, *kwargs.values()) if not isinstance(arg, _CONTEXTS)]
            self._charge_filter(name, values)
            result = self.allowance.nest(own(*args, **kwargs))
            return result if traces else self._of_unknown(result, values)

        return counted

    def _charge_filter(self, name: str, values: list[Any]) -> None:
        """Count what a filter reads, and bound what it makes."""
        allowance = self.allowance
        allowance.step()
        for value in values:
            if isinstance(value, str) or name in DEEP:
                allowance.visit(value)
            elif isinstance(value, (list, tuple, Mapping)):
                allowance.step(len(value))
            elif name in GROWING and isinstance(value, int):
                allowance.step(abs(value))
        if name in REPEATING:
            texts = [len(value) for value in values if isinstance(value, str)]
            allowance.make(sum(texts[:1]) * sum(texts[1:]))
        if name == "round" and any(isinstance(n, int) and abs(n) > 999 for n in values[1:]):
            raise TooMuch("rounds to more than 999 places")
        if name == "attr" and any(isinstance(n, str) and n.startswith("_") for n in values[1:]):
            raise TooMuch("reaches for a hidden attribute")

    @jinja2.pass_environment
    def _sum(self, _environment: Any, value: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
        """Add, after counting what adding lists one by one copies."""
        items, length = list(value), 0
        for item in items:
            length += _length(item)
            self.allowance.step(1 + length)
        return jinja2.filters.sync_do_sum(self, items, *args, **kwargs)

    # What the code that jinja2 generates calls, by way of `Limiter`:

    def tick(self) -> bool:
        """Count an iteration; the call itself is counted."""
        return True

    def nested(self, value: Any) -> Any:
        """Count a list, tuple or dict that the template writes out."""
        return self.allowance.nest(value)

    def compared(self, value: Any) -> Any:
        """Count a value that is compared with another."""
        self.allowance.visit(value)
        return value

    def _lipsum(self, n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
        self.allowance.make(n * max * 16)
        return jinja2.utils.generate_lorem_ipsum(n, html, min, max)


class _Format:
    """The bounded `format` or `format_map` of one string."""

    def __init__(self, pattern: str, formatter: TracedFormatter, *, is_map: bool) -> None:
        self._pattern, self._formatter, self._is_map = pattern, formatter, is_map

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        if self._is_map:
            (mapping,) = args
            return self._formatter.made(self._pattern, (), mapping)
        return self._formatter.made(self._pattern, args, kwargs)


def _bits(number: float) -> int:
    return number.bit_length() if isinstance(number, int) else 64


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _all(value: Any) -> Iterator[Any]:
    """Yield the value and everything in it."""
    pending = [value]
    while pending:
        item = pending.pop()
        yield item
        if isinstance(item, Mapping):
            pending += item.values()
        elif isinstance(item, (list, tuple)):
            pending += item


def compiled(source: str, functions: Mapping[str, Callable[..., Any]]) -> jinja2.Template:
    """Compile the template; it can call `functions`.

    Raises `TemplateError` with the line where it does not parse.
    """
    if len(source) > MAX_SOURCE:
        raise TooMuch(f"has more than {MAX_SOURCE:,} characters")
    try:
        return _BoundedEnvironment(functions).from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template does not parse at line {error.lineno}: {error.message}"
        ) from None
    except (RecursionError, MemoryError):
        raise TemplateError("the chat template is nested too deeply to parse") from None


def rendered(
    template: jinja2.Template,
    variables: Mapping[str, Any],
    allowance: Allowance,
    watched: Iterable[Any] = (),
) -> tuple[list[PromptSpan], bool]:
    """Render, and return the spans, and whether one of the `watched` values was printed in Python's notation.

    Every failure is a `TemplateError`.
    """
    environment = template.environment
    assert isinstance(environment, _BoundedEnvironment)
    environment.allowance = allowance
    environment.watched = {id(value): value for value in watched}
    environment.misused = False
    pieces, length = [], 0
    try:
        for piece in template.generate(variables):
            length += len(piece)
            allowance.check_printed(length)
            pieces.append(piece)
    except LowtideError:
        raise
    except RecursionError:
        raise TooMuch("calls itself without end") from None
    except Exception as error:  # untrusted code can raise anything
        reason = " ".join(str(error).split()).replace(_OWN_NAME, "str").replace("TracedText", "str")
        raise TemplateError(
            f"the chat template fails: {type(error).__name__}: {reason[:300]}"
        ) from None
    return spans_of(pieces), environment.misused
