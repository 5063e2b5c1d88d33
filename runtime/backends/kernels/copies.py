"""The folder of repacked copies: which there are, whose they are, which nobody needs, and whether another has room.

A copy is named by the fingerprint of its model's files. Beside it lies a text file that names these files, so that a
copy can be shown with its model, and deleted once no model has that fingerprint any more. While a copy is written,
its temporary file is locked: a temporary file without a lock was left behind by a process that was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lowtide.memory.units import format_bytes
from lowtide.models.facts.store import Facts
from lowtide.models.files.atomic_file import atomic_file
from lowtide.models.files.fingerprint import file_fingerprint
from lowtide.models.files.folders import CACHE_VARIABLE, cache_folder, unusable

FOLDER = "repacked"
SUFFIXES = (".gguf", ".tiles")
SOURCES = ".sources"
"""The suffix of the file with the paths of a copy's models."""
MAX_SOURCES_BYTES = 64 << 10
LEFT_BEHIND_S = 60.0
"""A temporary file is locked right after it was made; one without a lock is deleted when it is older than this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepackedCopy:
    """The files of a model's repacked copy, and the paths that its model had when they were made.

    `models` has the model's files once for each place; it is empty where they are not known.
    """

    fingerprint: str
    files: tuple[Path, ...]
    num_bytes: int
    models: tuple[tuple[Path, ...], ...]

    @property
    def is_needed(self) -> bool:
        """Whether a model that it was made from is still there, as it was, or not known."""
        return not self.models or any(self._is_model(paths) for paths in self.models)

    def _is_model(self, paths: Sequence[Path]) -> bool:
        with contextlib.suppress(OSError):
            return fingerprint_of(paths) == self.fingerprint
        return False


def copies_folder() -> Path | None:
    """Return the folder of repacked copies, which may not exist; None for a user without a cache folder."""
    folder = cache_folder()
    return folder / FOLDER if folder is not None else None


def fingerprint_of(paths: Sequence[Path]) -> str:
    """Return the fingerprint of exactly these files; it is stored until one of them changes."""
    facts = Facts.about("fingerprint", *paths)
    stored = facts.read()
    if isinstance(stored, str):
        return stored
    found = file_fingerprint(paths)
    facts.write(found, paths)
    return found


def no_room(num_bytes: int) -> str | None:
    """Return why a copy of so many bytes cannot be stored, and what to set; None where it can be.

    The disk must have room for it twice: a copy does not take the last of it.
    """
    folder = copies_folder()
    reason = unusable(folder, CACHE_VARIABLE)
    if reason is not None or folder is None:
        return reason
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes >= 2 * num_bytes:
        return None
    return (
        f"{folder} has {format_bytes(free_bytes)} free, and a copy of {format_bytes(num_bytes)} must leave as much "
        f"again: make room, or set {CACHE_VARIABLE} to another folder"
    )


def read_copies() -> list[RepackedCopy]:
    """Return the copies in the cache folder, the largest first."""
    files: dict[str, list[Path]] = {}
    for path in _entries():
        if path.suffix in SUFFIXES and not path.name.startswith("."):
            files.setdefault(_fingerprint(path), []).append(path)
    copies = [
        RepackedCopy(
            fingerprint=fingerprint,
            files=tuple(sorted(paths)),
            num_bytes=sum(_num_bytes(path) for path in paths),
            models=_read_sources(fingerprint),
        )
        for fingerprint, paths in files.items()
    ]
    return sorted(copies, key=lambda copy: (-copy.num_bytes, copy.fingerprint))


def _fingerprint(path: Path) -> str:
    """Return the fingerprint in a copy's name, which the number of a split model's part follows."""
    return path.stem.partition("-")[0]


def remember_model(fingerprint: str, paths: Sequence[Path]) -> None:
    """Write down that the copy of this fingerprint is that of the model with these files."""
    folder = copies_folder()
    files = tuple(Path(os.path.abspath(path)) for path in paths)
    known = _read_sources(fingerprint)
    if folder is None or files in known:
        return
    # Places that the model left are forgotten, or the list would grow with every folder that it was in.
    left = [entry for entry in known if all(path.exists() for path in entry)]
    lines = [json.dumps([str(path) for path in entry]) for entry in (*left, files)]
    with contextlib.suppress(OSError), atomic_file(folder / f"{fingerprint}{SOURCES}") as out:
        out.write("\n".join(lines).encode())


def _read_sources(fingerprint: str) -> tuple[tuple[Path, ...], ...]:
    folder = copies_folder()
    if folder is None:
        return ()
    try:
        with (folder / f"{fingerprint}{SOURCES}").open("rb") as file:
            lines = file.read(MAX_SOURCES_BYTES).decode("utf-8").splitlines()
        return tuple(tuple(Path(path) for path in json.loads(line)) for line in lines)
    except (OSError, ValueError, TypeError):
        return ()


def delete_copies(copies: Iterable[RepackedCopy]) -> int:
    """Delete these copies; return how many bytes were freed. Raises `OSError` where the system refuses it.

    A process that has mapped a copy keeps it until it ends.
    """
    num_bytes = 0
    for copy in copies:
        for path in copy.files:
            path.unlink(missing_ok=True)
            path.with_name(f"{copy.fingerprint}{SOURCES}").unlink(missing_ok=True)
        num_bytes += copy.num_bytes
    return num_bytes


def collect_copies() -> int:
    """Delete what nobody needs: copies without a model, and temporary files of processes that were killed.

    Returns how many bytes were freed. What cannot be deleted stays.
    """
    num_bytes = 0
    for copy in read_copies():
        if not copy.is_needed:
            with contextlib.suppress(OSError):
                num_bytes += delete_copies([copy])
    for path in _entries():
        if path.name.startswith("."):
            num_bytes += _deleted_if_left_behind(path)
    return num_bytes


def _deleted_if_left_behind(path: Path) -> int:
    with contextlib.suppress(OSError), path.open("rb") as file:
        status = os.fstat(file.fileno())
        if time.time() - status.st_mtime > LEFT_BEHIND_S and locked(file, wait=False):
            path.unlink(missing_ok=True)
            return status.st_size
    return 0


def locked(file: BinaryIO, *, wait: bool) -> bool:
    """Lock an open file until it is closed; return False where another process has it, or there are no locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _entries() -> Iterator[Path]:
    folder = copies_folder()
    with contextlib.suppress(OSError):
        yield from sorted(folder.iterdir()) if folder is not None else ()


def _num_bytes(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0
