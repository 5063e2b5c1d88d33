"""Transcript: a conversation on disk, checksummed and written whole or not at all.

Holds messages, no KV state: loading it costs one prefill. Knows no model but its name. What
`session_file` writes holds both.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.models.chat_template import checked_message
from lowtide.models.errors import TemplateError
from lowtide.models.whole_file import whole_file
from lowtide.runtime.errors import TranscriptError

FORMAT = "lowtide-chat"
FORMAT_VERSION = 1
MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """The messages of a chat and the name of the model that answered."""

    model: str
    messages: tuple[dict[str, str], ...]

    def save(self, path: Path) -> None:
        """Write the file under another name, then rename it: an older file stays whole on failure.

        Raises `TranscriptError` with the system's reason, such as a full disk.
        """
        body = {"format": FORMAT, "version": FORMAT_VERSION, **self.to_dict()}
        text = json.dumps({**body, "sha256": _checksum(body)}, ensure_ascii=False, indent=1)
        try:
            with whole_file(path) as file:
                file.write(text.encode())
        except OSError as error:
            raise TranscriptError(
                f"{path} was not saved ({error.strerror or error}): the conversation goes on, save it "
                "somewhere else"
            ) from None

    @classmethod
    def load(cls, path: Path) -> Transcript:
        """Read and verify a file. Raises `TranscriptError` with what is wrong with it."""
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise TranscriptError(f"{path} is larger than any conversation: name another file")
            body = json.loads(path.read_bytes().decode("utf-8"))
        except OSError as error:
            raise TranscriptError(f"{path} cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError):
            raise TranscriptError(
                f"{path} is no saved conversation: it is not JSON; name a file from /save"
            ) from None
        return cls._verified(path, body)

    @classmethod
    def _verified(cls, path: Path, body: Any) -> Transcript:
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise TranscriptError(f"{path} is no saved conversation: name a file from /save")
        if body.get("version") != FORMAT_VERSION:
            raise TranscriptError(
                f"{path} has format version {body.get('version')}, {FORMAT_VERSION} can be read: "
                "upgrade lowtide"
            )
        checksum = body.pop("sha256", None)
        if checksum != _checksum(body):
            raise TranscriptError(f"{path} is damaged, its checksum does not match: use a backup")
        return cls.from_dict(path, body)

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {"model": self.model, "messages": list(self.messages)}

    @classmethod
    def from_dict(cls, path: Path, body: dict[str, Any]) -> Transcript:
        """Return the transcript in a file's JSON; raises `TranscriptError` where there is none."""
        try:
            messages = tuple(checked_message(message) for message in body["messages"])
            return cls(model=str(body["model"]), messages=messages)
        except (TemplateError, KeyError, TypeError, AttributeError):
            raise TranscriptError(f"{path} holds messages that are none: use a backup") from None


def _checksum(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", errors="surrogatepass")).hexdigest()
