"""SessionFile: the KV state of a conversation and all that belongs to it, in one checksummed file.

    state   as the model writes it; it stands first, since llama.cpp reads a file from its beginning
    head    JSON in UTF-8: whose state it is, how to go on, the messages
    foot    magic, bytes of state, bytes of head, SHA-256 of everything before it

The state is never in memory as a whole. Knows no model and no messages.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from lowtide.memory.footprint import SESSION_CHUNK_BYTES
from lowtide.models.errors import StateError
from lowtide.models.whole_file import whole_file
from lowtide.runtime.errors import TranscriptError

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
        with whole_file(path) as file:
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
    except (OSError, StateError) as error:
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
