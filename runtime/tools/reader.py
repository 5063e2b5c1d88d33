"""CallReader: takes the calls of tools out of what a model writes, while it writes."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lowtide.models.template.call_format import ID
from lowtide.runtime.tools.grammar import CallSyntax

_ALPHABET = string.ascii_letters + string.digits
DEFAULT_ID_LENGTH = 24


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What is added to the call of a tool: its id and name once, at its start, then its arguments as JSON text."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


class CallReader:
    """Splits a text into what is said and what is called.

    What looks like a call but is none stays text. `control` are the texts of the format's control tokens, by id: they
    have no text of their own.
    """

    def __init__(self, syntax: CallSyntax, names: Sequence[str]) -> None:
        form = syntax.form
        self.control: Mapping[int, str] = {i: text for text, i in syntax.control.items()}
        self._form = form
        longest_first = sorted(names, key=len, reverse=True)
        name = "(?P<name>" + "|".join(map(re.escape, longest_first)) + ")"
        middle = _pattern(form.middle, form.id_length)
        self._first = re.compile(_pattern(form.behind_trigger, form.id_length) + name + middle)
        between = _pattern(form.between or "", form.id_length)
        self._next = re.compile(between + name + middle) if form.between is not None else None
        self._longest = len(form.prefix + form.middle + (form.between or "")) + 64 + form.id_length
        self._trigger = form.trigger or form.prefix
        if not form.trigger:
            self._first = re.compile(name + middle)
        self._state: Callable[[list[str], list[CallDelta]], bool] = self._read_text
        self._has_text = False
        self._buffer = ""
        self._blank = ""
        self._scanner = JsonScanner()
        self.num_calls = 0

    def push(self, text: str) -> tuple[str, tuple[CallDelta, ...]]:
        """Return what may be shown of the text now, and what is added to calls."""
        shown, calls = list[str](), list[CallDelta]()
        self._buffer += text
        while self._state(shown, calls):
            pass
        return self._without_blanks("".join(shown)), tuple(calls)

    def finish(self) -> str:
        """Return the text that was held back; the answer has ended."""
        rest = ""
        if self._state == self._read_first:
            rest = self._trigger + self._buffer
        elif self._state == self._read_text:
            rest = self._buffer
        self._buffer = ""
        return self._without_blanks(rest) + (self._blank if not self.num_calls else "")

    def _without_blanks(self, text: str) -> str:
        """Hold back white space at the start and around calls: it belongs to no text."""
        if not text:
            return ""
        text = self._blank + text
        kept = text.rstrip() if text.strip() else ""
        self._blank = text[len(kept) :]
        return kept

    def _read_text(self, shown: list[str], _calls: list[CallDelta]) -> bool:
        at = self._buffer.find(self._trigger)
        if at >= 0 and self._may_begin(self._buffer[:at]):
            shown.append(self._buffer[:at])
            self._buffer = self._buffer[at + len(self._trigger) :]
            self._state = self._read_first
            return True
        split = len(self._buffer) - _overlap(self._buffer, self._trigger)
        shown.append(self._buffer[:split])
        self._has_text = self._has_text or bool(self._buffer[:split].strip())
        self._buffer = self._buffer[split:]
        return False

    def _may_begin(self, before: str) -> bool:
        """Whether a call may begin behind this text: without a text that begins calls, only first of all."""
        return bool(self._form.trigger) or not (self._has_text or before.strip())

    def _read_first(self, shown: list[str], calls: list[CallDelta]) -> bool:
        found = self._first.match(self._buffer)
        if found is not None:
            return self._begin(found, calls)
        if len(self._buffer) <= self._longest:
            return False
        shown.append(self._trigger)
        self._has_text = True
        self._state = self._read_text
        return True

    def _begin(self, found: re.Match[str], calls: list[CallDelta]) -> bool:
        calls.append(CallDelta(self.num_calls, "", self._new_id(), found["name"]))
        self.num_calls += 1
        self._buffer = self._buffer[found.end() :]
        self._scanner = JsonScanner()
        self._state = self._read_arguments
        return True

    def _read_arguments(self, _shown: list[str], calls: list[CallDelta]) -> bool:
        length = self._scanner.take(self._buffer)
        if length:
            calls.append(CallDelta(self.num_calls - 1, self._buffer[:length]))
            self._buffer = self._buffer[length:]
        if self._scanner.is_complete:
            self._state = self._read_behind
            return True
        return False

    def _read_behind(self, _shown: list[str], calls: list[CallDelta]) -> bool:
        """Read what follows a call: another one, or the end of calls, behind which text may come again."""
        found = self._next.match(self._buffer) if self._next is not None else None
        if found is not None:
            return self._begin(found, calls)
        if len(self._buffer) <= self._longest:
            return False
        self._buffer = self._buffer.removeprefix(self._form.suffix)
        self._state = self._read_text
        return True

    def _new_id(self) -> str:
        """Return an id of a call, of the length that the template wants."""
        length = self._form.id_length or DEFAULT_ID_LENGTH
        made = "".join(secrets.choice(_ALPHABET) for _ in range(length))
        return made if self._form.id_length else f"call_{made}"


@dataclass(slots=True)
class JsonScanner:
    """Finds the end of a JSON object that arrives in pieces."""

    depth: int = 0
    in_string: bool = False
    is_escaped: bool = False
    is_complete: bool = field(default=False)

    def take(self, text: str) -> int:
        """Return how many characters of the text belong to the object."""
        for i, character in enumerate(text):
            if self.in_string:
                self._in_string(character)
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth <= 0:
                    self.is_complete = True
                    return i + 1
            elif character == '"':
                self.in_string = True
        return len(text)

    def _in_string(self, character: str) -> None:
        if self.is_escaped:
            self.is_escaped = False
        elif character == "\\":
            self.is_escaped = True
        elif character == '"':
            self.in_string = False


def _overlap(text: str, start: str) -> int:
    """Return the length of the longest end of `text` that is a start of `start`, but not all of it."""
    most = min(len(start) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(start[:n])), 0)


def _pattern(text: str, id_length: int) -> str:
    return re.escape(text).replace(re.escape(ID), f"[A-Za-z0-9]{{{id_length}}}")
