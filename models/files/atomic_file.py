"""Files and folders that appear complete under their name, or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lowtide.models.errors import BadOption

CHECKSUMS = "SHA256SUMS"
_READ_BYTES = 1 << 20


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file beside `path` that replaces `path` when the block succeeds.

    However the block ends otherwise, even by a kill, an older file stays as it was. Only its owner may read
    the new file. Raises `OSError` with the system's reason.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "something by that name exists and is not a file")
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent or Path())
    os.close(handle)
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path, *, replace: bool) -> Iterator[Path]:
    """Yield a new folder beside `path` that replaces `path`, with checksums, when the block succeeds.

    However the block ends otherwise, what is at `path` stays. With `replace` an older folder made by this
    function, or an empty one, is replaced; anything else at `path` raises `BadOption`. Raises `OSError` with
    the system's reason.
    """
    path = path.absolute()
    if not replace and (path.exists() or path.is_symlink()):
        raise BadOption(f"{path} exists: name a new folder, or add --force to replace it")
    if path.exists() and not _is_replaceable(path):
        raise BadOption(
            f"{path} was not made by lowtide convert and would be deleted: name another folder"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        _write_checksums(temporary)
        temporary.chmod(0o755)
        _move(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _is_replaceable(path: Path) -> bool:
    return path.is_dir() and ((path / CHECKSUMS).is_file() or not any(path.iterdir()))


def _move(new: Path, path: Path) -> None:
    """Rename the new folder to `path`; an older one is moved away first and deleted last."""
    if not path.exists():
        os.rename(new, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_checksums(folder: Path) -> None:
    """Write one line per file, as `sha256sum -c` reads them, after every file is on the disk."""
    lines = []
    for file in sorted(folder.iterdir()):
        digest = hashlib.sha256()
        with file.open("rb") as data:
            while chunk := data.read(_READ_BYTES):
                digest.update(chunk)
            os.fsync(data.fileno())
        lines.append(f"{digest.hexdigest()}  {file.name}\n")
    with (folder / CHECKSUMS).open("w", encoding="utf-8") as sums:
        sums.write("".join(lines))
        sums.flush()
        os.fsync(sums.fileno())
