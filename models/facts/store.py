"""Facts about files that were read or measured once, stored in the cache folder until one of the files changes.

Reading a header, digesting samples of a file and having llama.cpp lay a model out take a tenth of a second or more,
and give the same result until the file, the library or the code that reads them changes. So each fact is stored with
the files that it depends on, each by its size, its times, its inode and its device, and is not used when one of these
differs. A file of facts that is damaged, or belongs to another user, is not used either. Without a cache folder, or
with one that cannot be written, nothing is stored and everything is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.models.files.atomic_file import atomic_file
from lowtide.models.files.folders import cache_folder

MAX_FILE_BYTES = 512 << 10
"""Larger facts are not stored: a chat template of megabytes, for example."""
MAX_FOLDER_BYTES = 8 << 20
MAX_FILES = 256
"""When the folder has more bytes or files than these, those that were written first are deleted."""
SETTLED_S = 3.0
"""A file that changed so shortly before it was read may change again without another time: some file systems count
in steps of two seconds. Nothing is stored of it."""
SUFFIX = ".json"


def facts_folder() -> Path | None:
    """Return the folder of stored facts; None for a user without a cache folder."""
    folder = cache_folder()
    return folder / "facts" if folder is not None else None


@dataclass(frozen=True, slots=True)
class Facts:
    """A place for facts of one kind, such as "header", about one `subject`: a text, such as the path of a model.

    Make it before the files are read: `write` stores nothing where a file changed since then.
    """

    kind: str
    subject: str
    since: float

    @classmethod
    def about(cls, kind: str, *subject: str | os.PathLike[str]) -> Facts:
        """Return the place for facts of this kind; relative paths count from the working directory."""
        parts = (os.path.abspath(p) if isinstance(p, os.PathLike) else p for p in subject)
        return cls(kind, "\n".join(parts), time.time())

    @property
    def path(self) -> Path | None:
        """The file of the facts, which may not exist; None without a cache folder."""
        folder = facts_folder()
        digest = hashlib.sha256(f"{self.kind}\n{self.subject}".encode(errors="surrogateescape"))
        name = f"{self.kind}-{digest.hexdigest()[:24]}{SUFFIX}"
        return folder / name if folder is not None else None

    def read(self) -> Any:
        """Return the stored value; None where there is none, or a file that it depends on has changed."""
        path = self.path
        try:
            data = _own_data(path) if path is not None else b""
            checksum, _, body = data.partition(b"\n")
            if not body or checksum.decode("ascii") != _checksum(body):
                return None
            stored = json.loads(body)
            if stored["subject"] != self.subject:
                return None
            if stored["files"] != [_identity(Path(file[0])) for file in stored["files"]]:
                return None
            return stored["value"]
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return None

    def write(self, value: Any, files: Iterable[Path]) -> None:
        """Store a value of JSON's types until one of `files` changes; store nothing where that cannot be told."""
        path = self.path
        if path is None:
            return
        with contextlib.suppress(OSError, ValueError):
            identities = [_identity(file) for file in files]
            if max(map(_last_change_s, identities)) > self.since - SETTLED_S:
                return  # `max` raises `ValueError` without a file: such a fact would hold for ever
            stored = {"subject": self.subject, "files": identities, "value": value}
            body = json.dumps(stored, separators=(",", ":")).encode()
            if len(body) > MAX_FILE_BYTES:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                file.write(f"{_checksum(body)}\n".encode() + body)
            _delete_oldest(path.parent)


def _own_data(path: Path) -> bytes:
    """Return the bytes of a file of this user's; none of a file that is too large."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        owner = getattr(os, "getuid", lambda: status.st_uid)()
        if status.st_uid != owner or status.st_size > 2 * MAX_FILE_BYTES:
            return b""
        return file.read()


def _checksum(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _identity(path: Path) -> list[str | int]:
    """Return what changes when a file does: its path, size, times, inode and device."""
    path = Path(os.path.abspath(path))
    status = path.stat()
    return [
        str(path),
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_ino,
        status.st_dev,
    ]


def _last_change_s(identity: list[str | int]) -> float:
    return max(int(identity[2]), int(identity[3])) / 1e9


def _delete_oldest(folder: Path) -> None:
    """Delete the files that were written first, until the others are within the folder's limits."""
    files = []
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):  # another process deletes them, too
            status = entry.stat()
            files.append((status.st_mtime_ns, status.st_size, entry.path))
    left = sum(num_bytes for _, num_bytes, _ in files)
    num_left = len(files)
    for _, num_bytes, path in sorted(files):
        if left <= MAX_FOLDER_BYTES and num_left <= MAX_FILES:
            break
        with contextlib.suppress(OSError):
            os.unlink(path)
        left, num_left = left - num_bytes, num_left - 1
