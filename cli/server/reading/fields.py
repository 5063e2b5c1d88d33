"""Fields: the members of a JSON object, read one by one. What nobody reads is refused by name.

A field that is unknown may change an answer, or be a known one that is misspelt: it is never ignored. A member that is
null counts as absent, as OpenAI's clients write it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lowtide.cli.server.errors import ApiError
from lowtide.models.arguments.values import as_whole, plain_name, shown


class Fields:
    """The members of `value`, which is at `where` in the request; raises `ApiError` where it is no object."""

    def __init__(self, value: Any, where: str = "") -> None:
        if not isinstance(value, Mapping):
            raise ApiError(
                400,
                f"{where or 'the request'} is {shown(value)}; it must be a JSON object",
                param=where or None,
            )
        self._left = {str(name): item for name, item in value.items() if item is not None}
        self._where = where

    def path(self, name: str | int) -> str:
        """Return how an error names a member."""
        return f"{self._where}.{name}" if self._where else str(name)

    def has(self, name: str) -> bool:
        """Whether the member is there and was not read."""
        return name in self._left

    def take(self, name: str) -> Any:
        """Return a member as it is; None where there is none."""
        return self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        """Return a member that must be a text."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, value, "a text")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a member that must be true or false."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def whole(self, name: str, least: int, most: int) -> int | None:
        """Return a member that must be a whole number between `least` and `most`."""
        value = self.take(name)
        if value is None:
            return None
        found = None if isinstance(value, str) else as_whole(value)
        if found is None or not least <= found <= most:
            raise self._wrong(name, value, f"a whole number from {least} to {most}")
        return found

    def choice(self, name: str, choices: Sequence[str]) -> str | None:
        """Return a member that must be one of `choices`."""
        value = self.take(name)
        if value is not None and (not isinstance(value, str) or value not in choices):
            raise self._wrong(name, value, "one of " + ", ".join(choices))
        return value

    def list(self, name: str) -> list[Any] | None:
        """Return a member that must be a list."""
        value = self.take(name)
        if value is not None and not isinstance(value, list):
            raise self._wrong(name, value, "a list")
        return value

    def object(self, name: str) -> Fields | None:
        """Return a member that must be an object."""
        value = self.take(name)
        return None if value is None else Fields(value, self.path(name))

    def ignore(self, *names: str) -> None:
        """Drop members that change no answer."""
        for name in names:
            self._left.pop(name, None)

    def only(self, name: str, value: Any, reason: str) -> None:
        """Refuse a member by name unless it has the one value that changes nothing."""
        if self.has(name):
            if self._left[name] != value:
                self.refuse({name: reason})
            self.ignore(name)

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Refuse members by name; each reason says why, and what to do."""
        for name, reason in reasons.items():
            if name in self._left:
                raise ApiError(
                    400,
                    f"{self.path(name)} is not supported: {reason}",
                    param=self.path(name),
                    code="unsupported_parameter",
                )

    def finish(self, known: Iterable[str] = ()) -> None:
        """Refuse what is left; `known` are names that the error may suggest."""
        if not self._left:
            return
        name = next(iter(self._left))
        hint = _nearest(name, known)
        also = f"; do you mean {hint}?" if hint else ", and could change the answer: leave it out"
        path = self.path(plain_name(name))
        raise ApiError(
            400,
            f"{path} is not known here{also}",
            param=path,
            code="unknown_parameter",
        )

    def _wrong(self, name: str, value: Any, what: str) -> ApiError:
        return ApiError(
            400,
            f"{self.path(name)} is {shown(value)}; it must be {what}",
            param=self.path(name),
            code="invalid_value",
        )


def _nearest(name: str, known: Iterable[str]) -> str | None:
    from difflib import get_close_matches

    found = get_close_matches(name[:64], list(known), 1, 0.75)
    return found[0] if found else None
