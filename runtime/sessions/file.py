"""Files of saved chats: a transcript alone (JSON), or a chat file with the KV snapshot, too. Both are checksummed.

A chat file is laid out as follows.

    snapshot   the KV cache as the model writes it; first, because llama.cpp reads a file from its beginning
    header     JSON in UTF-8: what the snapshot is of, how to go on from it, and the messages
    footer     magic, bytes of the snapshot, bytes of the header, SHA-256 of everything before it

The snapshot is never in memory as a whole. A file is written completely or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from lowtide.memory.plan.estimates import SESSION_CHUNK_BYTES
from lowtide.models.arguments.names import option
from lowtide.models.chat_template import checked_message
from lowtide.models.errors import SnapshotError, TemplateError
from lowtide.models.files.atomic_file import atomic_file
from lowtide.runtime.errors import SnapshotMismatch, TranscriptError
from lowtide.runtime.generation.turns import LastTurn

MAGIC = b"lowtide\x01"
FORMAT_VERSION = 2
"""1 called the properties of the snapshot its owner."""
MAX_HEADER_BYTES = 64 << 20
FileStamp: TypeAlias = tuple[int, int]
_LENGTHS = struct.Struct("<8sQQ")
FOOTER_BYTES = _LENGTHS.size + hashlib.sha256().digest_size


def write_chat(path: Path, write_snapshot: Callable[[Path], int], header: dict[str, Any]) -> int:
    """Write a chat file completely or not at all, and return its bytes.

    `write_snapshot` writes the file at the path that it is called with and returns its bytes. Raises
    `TranscriptError` with the reason, such as a full disk.
    """
    try:
        with atomic_file(path) as file:
            num_snapshot_bytes = write_snapshot(Path(str(file.name)))
            digest = _digest(file, num_snapshot_bytes)
            num_header_bytes = 0
            for text in json.JSONEncoder().iterencode({**header, "version": FORMAT_VERSION}):
                num_header_bytes += file.write(text.encode())
                digest.update(text.encode())
            lengths = _LENGTHS.pack(MAGIC, num_snapshot_bytes, num_header_bytes)
            digest.update(lengths)
            file.write(lengths + digest.digest())
            return file.tell()
    except (OSError, SnapshotError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TranscriptError(
            f"{path} was not saved ({reason}); the chat goes on, save it somewhere else"
        ) from None


class ChatFile:
    """A chat file whose checksum is right; made by `open_chat`."""

    def __init__(
        self, path: Path, file: BinaryIO, lengths: tuple[int, int], stamp: FileStamp
    ) -> None:
        self.path = path
        self.num_snapshot_bytes, self.num_header_bytes = lengths
        self._file = file
        self._stamp = stamp

    def header(self) -> dict[str, Any]:
        """Return the header's JSON object."""
        self._file.seek(self.num_snapshot_bytes)
        try:
            header = json.loads(self._file.read(self.num_header_bytes))
        except (ValueError, RecursionError):
            header = None
        version = header.get("version") if isinstance(header, dict) else None
        if not isinstance(header, dict) or version != FORMAT_VERSION:
            raise TranscriptError(
                f"{self.path} has format version {version}, but only version {FORMAT_VERSION} can be read; "
                "use the version of lowtide that saved it"
            )
        return header

    @property
    def snapshot_path(self) -> Path:
        """Path of the bytes that were checked, also where another file has taken the name since."""
        same = Path(f"/proc/self/fd/{self._file.fileno()}")
        return same if same.exists() else self.path

    def require_unchanged(self) -> None:
        """Raise `TranscriptError` where the file was written to since it was checked."""
        if _stamp(self._file) != self._stamp:
            raise TranscriptError(f"{self.path} was changed while it was read; load it again")


@contextlib.contextmanager
def open_chat(path: Path) -> Iterator[ChatFile | None]:
    """Check a file from beginning to end and yield it; None where it is not a chat file with a snapshot.

    Raises `TranscriptError` where it is damaged or cannot be read.
    """
    with _readable(path) as file:
        stamp = _stamp(file)
        num_bytes = os.fstat(file.fileno()).st_size
        file.seek(max(num_bytes - FOOTER_BYTES, 0))
        footer = file.read(FOOTER_BYTES)
        if len(footer) < FOOTER_BYTES or not footer.startswith(MAGIC):
            yield None
            return
        _, num_snapshot_bytes, num_header_bytes = _LENGTHS.unpack_from(footer)
        digest = _digest(file, num_bytes - FOOTER_BYTES)
        digest.update(footer[: _LENGTHS.size])
        if (
            num_snapshot_bytes + num_header_bytes + FOOTER_BYTES != num_bytes
            or num_header_bytes > MAX_HEADER_BYTES
            or digest.digest() != footer[_LENGTHS.size :]
        ):
            raise TranscriptError(f"{path} is damaged, its checksum is wrong; use a backup")
        chat = ChatFile(path, file, (num_snapshot_bytes, num_header_bytes), stamp)
        chat.require_unchanged()
        yield chat


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[BinaryIO]:
    try:
        if path.exists() and not path.is_file():
            raise TranscriptError(f"{path} is not a regular file; name a file written by /save")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise TranscriptError(f"{path} cannot be read: {error.strerror or error}") from None


def _stamp(file: BinaryIO) -> FileStamp:
    """Return what changes when somebody writes to the file."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _digest(file: BinaryIO, num_bytes: int) -> Any:
    """Return the SHA-256 of the first bytes; the file's position is behind them then."""
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(SESSION_CHUNK_BYTES))
    file.seek(0)
    while num_bytes > 0:
        num_read = file.readinto(chunk[: min(num_bytes, len(chunk))])  # type: ignore[attr-defined]
        if not num_read:
            raise OSError(f"it ends {num_bytes:,} bytes too early")
        digest.update(chunk[:num_read])
        num_bytes -= num_read
    return digest


FORMAT = "lowtide-chat"
TRANSCRIPT_VERSION = 1
MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """The messages of a chat and the name of the model that answered; loading it costs one prefill."""

    model: str
    messages: tuple[dict[str, str], ...]

    def save(self, path: Path) -> None:
        """Write the file under a temporary name, then rename it: an older file stays whole on failure.

        Raises `TranscriptError` with the system's reason, such as a full disk.
        """
        body = {"format": FORMAT, "version": TRANSCRIPT_VERSION, **self.to_dict()}
        text = json.dumps({**body, "sha256": _checksum(body)}, ensure_ascii=False, indent=1)
        try:
            with atomic_file(path) as file:
                file.write(text.encode())
        except OSError as error:
            raise TranscriptError(
                f"{path} was not saved ({error.strerror or error}); the chat goes on, save it somewhere else"
            ) from None

    @classmethod
    def load(cls, path: Path) -> Transcript:
        """Read and check a file. Raises `TranscriptError` with what is wrong with it."""
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise TranscriptError(f"{path} is larger than any chat; name another file")
            body = json.loads(path.read_bytes().decode("utf-8"))
        except OSError as error:
            raise TranscriptError(f"{path} cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError):
            raise TranscriptError(
                f"{path} is not a saved chat: it is not JSON; name a file written by /save"
            ) from None
        return cls._verified(path, body)

    @classmethod
    def _verified(cls, path: Path, body: Any) -> Transcript:
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise TranscriptError(f"{path} is not a saved chat; name a file written by /save")
        if body.get("version") != TRANSCRIPT_VERSION:
            raise TranscriptError(
                f"{path} has format version {body.get('version')}, but only version "
                f"{TRANSCRIPT_VERSION} can be read; upgrade lowtide"
            )
        checksum = body.pop("sha256", None)
        if checksum != _checksum(body):
            raise TranscriptError(f"{path} is damaged, its checksum is wrong; use a backup")
        return cls.from_dict(path, body)

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {"model": self.model, "messages": list(self.messages)}

    @classmethod
    def from_dict(cls, path: Path, body: dict[str, Any]) -> Transcript:
        """Return the transcript in a file's JSON; raises `TranscriptError` where it is invalid."""
        try:
            messages = tuple(checked_message(one, any_role=True) for one in body["messages"])
            return cls(model=str(body["model"]), messages=messages)
        except (TemplateError, KeyError, TypeError, AttributeError):
            raise TranscriptError(f"{path} has invalid messages; use a backup") from None


def _checksum(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", errors="surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatHeader:
    """What a KV snapshot depends on (`properties` by name), its tokens, and how to go on from them.

    Tokens from position `exact_until` on were computed by an approximate pass.
    """

    properties: dict[str, str]
    num_tokens: int
    exact_until: int
    last: LastTurn
    transcript: Transcript

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {
            "properties": self.properties,
            "num_tokens": self.num_tokens,
            "exact_until": self.exact_until,
            "last": asdict(self.last),
            **self.transcript.to_dict(),
        }

    @classmethod
    def from_dict(cls, path: Path, values: dict[str, Any]) -> ChatHeader:
        """Return the header in a file's JSON; raises `TranscriptError` where it is invalid."""
        transcript = Transcript.from_dict(path, values)
        try:
            last = values["last"]
            return cls(
                properties={str(name): str(value) for name, value in values["properties"].items()},
                num_tokens=int(values["num_tokens"]),
                exact_until=max(int(values["exact_until"]), 0),
                last=LastTurn(
                    str(last["text"]),
                    [int(i) for i in last["token_ids"]],
                    int(last["num_messages"]),
                    [int(i) for i in last.get("span_lengths", ())],
                ),
                transcript=transcript,
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise TranscriptError(f"{path} has an invalid header; use a backup") from None

    def require_match(self, path: Path, properties: dict[str, str], context: int) -> None:
        """Raise `SnapshotMismatch` where the snapshot has other properties or does not fit the context."""
        for name, expected in properties.items():
            found = self.properties.get(name)
            if found != expected:
                raise SnapshotMismatch(
                    f"{path} was saved with the {name} {found}, but the {name} is {expected} now; use that of "
                    "the file, or go on with the messages alone"
                )
        if self.num_tokens > context:
            raise SnapshotMismatch(
                f"{path} has {self.num_tokens:,} tokens but the context holds {context:,}; raise {option('context')}, "
                "or go on with the messages alone"
            )
