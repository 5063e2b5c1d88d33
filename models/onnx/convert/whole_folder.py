"""WholeFolder: a folder that appears whole under its name, or not at all. Knows no format."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lowtide.models.errors import BadOption

CHECKSUMS = "SHA256SUMS"
_READ_BYTES = 1 << 20


@contextlib.contextmanager
def whole_folder(path: Path, *, replace: bool) -> Iterator[Path]:
    """Yield a new folder beside `path`; it takes `path`'s place, with checksums, when the block ends well.

    However the block ends otherwise, what was at `path` stays. `replace` has an older such folder give
    way; without it, one that is there is a `BadOption`, as is any other folder that is not empty. Raises
    `OSError` with the system's reason.
    """
    path = path.absolute()
    if not replace and (path.exists() or path.is_symlink()):
        raise BadOption(f"{path} exists, a new folder is wanted: name another one, or add --force")
    if path.exists() and not _may_give_way(path):
        raise BadOption(
            f"{path} is nothing that was converted here, and would be deleted: name another folder"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        _write_checksums(temporary)
        temporary.chmod(0o755)
        _put(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _may_give_way(path: Path) -> bool:
    return path.is_dir() and ((path / CHECKSUMS).is_file() or not any(path.iterdir()))


def _put(new: Path, path: Path) -> None:
    """Rename the new folder to `path`; an older one steps aside first, and is deleted last."""
    if not path.exists():
        os.rename(new, path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _write_checksums(folder: Path) -> None:
    """Write a line for each file, as `sha256sum -c` reads them, with everything on the disk before."""
    lines = []
    for file in sorted(folder.iterdir()):
        digest = hashlib.sha256()
        with file.open("rb") as data:
            while piece := data.read(_READ_BYTES):
                digest.update(piece)
            os.fsync(data.fileno())
        lines.append(f"{digest.hexdigest()}  {file.name}\n")
    with (folder / CHECKSUMS).open("w", encoding="utf-8") as written:
        written.write("".join(lines))
        written.flush()
        os.fsync(written.fileno())
