"""SessionFile: the KV state of a conversation and all that belongs to it, in one checksummed file.

    state   as the model writes it; it stands first, since llama.cpp reads a file from its beginning
    head    JSON in UTF-8: whose state it is, how to go on, the messages
    foot    magic, bytes of state, bytes of head, SHA-256 of everything before it

The state is never in memory as a whole. Knows no model and no messages.

SessionHead: what a session file says beside the KV state. Knows no file and no model.

Transcript: a conversation on disk, checksummed and written whole or not at all.

Holds messages, no KV state: loading it costs one prefill. Knows no model but its name. What
`session_file` writes holds both."""

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
from lowtide.models.atomic_file import atomic_file
from lowtide.models.chat_template import checked_message
from lowtide.models.errors import SnapshotError, TemplateError
from lowtide.runtime.errors import SessionMismatch, TranscriptError
from lowtide.runtime.generation.chat import LastTurn

MAGIC = b"lowtide\x01"
FORMAT_VERSION = 1
MAX_HEAD_BYTES = 64 << 20
Seen: TypeAlias = tuple[int, int]
_LENGTHS = struct.Struct("<8sQQ")
FOOT_BYTES = _LENGTHS.size + hashlib.sha256().digest_size


def write_session(path: Path, write_state: Callable[[Path], int], head: dict[str, Any]) -> int:
    """Write the file whole or not at all, and return its bytes.

    `write_state` makes the file that it is given and returns its bytes. Raises `TranscriptError` with the
    reason, such as a full disk.
    """
    try:
        with atomic_file(path) as file:
            num_state_bytes = write_state(Path(str(file.name)))
            digest = _digest(file, num_state_bytes)
            num_head_bytes = 0
            for piece in json.JSONEncoder().iterencode({**head, "version": FORMAT_VERSION}):
                num_head_bytes += file.write(piece.encode())
                digest.update(piece.encode())
            lengths = _LENGTHS.pack(MAGIC, num_state_bytes, num_head_bytes)
            digest.update(lengths)
            file.write(lengths + digest.digest())
            return file.tell()
    except (OSError, SnapshotError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TranscriptError(
            f"{path} was not saved ({reason}): the conversation goes on, save it somewhere else"
        ) from None


class SessionFile:
    """A file that was read through once and is what was written; made by `opened_session`."""

    def __init__(self, path: Path, file: BinaryIO, lengths: tuple[int, int], seen: Seen) -> None:
        self.path = path
        self.num_state_bytes, self.num_head_bytes = lengths
        self._file = file
        self._seen = seen

    def head(self) -> dict[str, Any]:
        """Return the JSON object."""
        self._file.seek(self.num_state_bytes)
        try:
            head = json.loads(self._file.read(self.num_head_bytes))
        except (ValueError, RecursionError):
            head = None
        if not isinstance(head, dict) or head.get("version") != FORMAT_VERSION:
            raise TranscriptError(
                f"{self.path} is of another version than {FORMAT_VERSION}, which can be read: "
                "upgrade lowtide"
            )
        return head

    @property
    def state_path(self) -> Path:
        """Where the bytes that were checked can be opened, whatever has taken the name since."""
        same = Path(f"/proc/self/fd/{self._file.fileno()}")
        return same if same.exists() else self.path

    def require_unchanged(self) -> None:
        """Raise `TranscriptError` where somebody has written into the file since it was checked."""
        if _seen(self._file) != self._seen:
            raise TranscriptError(f"{self.path} was changed while it was read: load it again")


@contextlib.contextmanager
def opened_session(path: Path) -> Iterator[SessionFile | None]:
    """Check a file from beginning to end and yield it; None where it is no session file.

    Raises `TranscriptError` where it is damaged or cannot be read.
    """
    with _readable(path) as file:
        seen = _seen(file)
        num_bytes = os.fstat(file.fileno()).st_size
        file.seek(max(num_bytes - FOOT_BYTES, 0))
        foot = file.read(FOOT_BYTES)
        if len(foot) < FOOT_BYTES or not foot.startswith(MAGIC):
            yield None
            return
        _, num_state_bytes, num_head_bytes = _LENGTHS.unpack_from(foot)
        digest = _digest(file, num_bytes - FOOT_BYTES)
        digest.update(foot[: _LENGTHS.size])
        if (
            num_state_bytes + num_head_bytes + FOOT_BYTES != num_bytes
            or num_head_bytes > MAX_HEAD_BYTES
            or digest.digest() != foot[_LENGTHS.size :]
        ):
            raise TranscriptError(f"{path} is damaged, its checksum does not match: use a backup")
        session = SessionFile(path, file, (num_state_bytes, num_head_bytes), seen)
        session.require_unchanged()
        yield session


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[BinaryIO]:
    try:
        if path.exists() and not path.is_file():
            raise TranscriptError(f"{path} is no file: name a file from /save")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise TranscriptError(f"{path} cannot be read: {error.strerror or error}") from None


def _seen(file: BinaryIO) -> Seen:
    """What changes when somebody writes into the file."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _digest(file: BinaryIO, num_bytes: int) -> Any:
    """Return the SHA-256 of the first bytes, and leave the file behind them."""
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
    """The messages of a chat and the name of the model that answered."""

    model: str
    messages: tuple[dict[str, str], ...]

    def save(self, path: Path) -> None:
        """Write the file under another name, then rename it: an older file stays whole on failure.

        Raises `TranscriptError` with the system's reason, such as a full disk.
        """
        body = {"format": FORMAT, "version": TRANSCRIPT_VERSION, **self.to_dict()}
        text = json.dumps({**body, "sha256": _checksum(body)}, ensure_ascii=False, indent=1)
        try:
            with atomic_file(path) as file:
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
        if body.get("version") != TRANSCRIPT_VERSION:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionHead:
    """Whose KV state it is (`component`, by property), how many tokens it holds and how to go on from them.

    Tokens from `exact_until` on were computed by an approximate pass.
    """

    component: dict[str, str]
    num_tokens: int
    exact_until: int
    last: LastTurn
    transcript: Transcript

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {
            "component": self.component,
            "num_tokens": self.num_tokens,
            "exact_until": self.exact_until,
            "last": asdict(self.last),
            **self.transcript.to_dict(),
        }

    @classmethod
    def from_dict(cls, path: Path, values: dict[str, Any]) -> SessionHead:
        """Return the head in a file's JSON; raises `TranscriptError` where it is none."""
        transcript = Transcript.from_dict(path, values)
        try:
            last = values["last"]
            return cls(
                component={str(name): str(value) for name, value in values["component"].items()},
                num_tokens=int(values["num_tokens"]),
                exact_until=max(int(values["exact_until"]), 0),
                last=LastTurn(
                    str(last["text"]),
                    [int(i) for i in last["token_ids"]],
                    int(last["num_messages"]),
                ),
                transcript=transcript,
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise TranscriptError(f"{path} holds values that are none: use a backup") from None

    def require_match(self, path: Path, component: dict[str, str], context: int) -> None:
        """Raise `SessionMismatch` where the state is not `component`'s or does not fit the context."""
        for name, ours in component.items():
            theirs = self.component.get(name)
            if theirs != ours:
                raise SessionMismatch(
                    f"{path} was saved with the {name} {theirs}, here it is {ours}: open that one, or "
                    "go on with its messages alone"
                )
        if self.num_tokens > context:
            raise SessionMismatch(
                f"{path} holds {self.num_tokens:,} tokens, the context {context:,}: raise --context, or "
                "go on with its messages alone"
            )
