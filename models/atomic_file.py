"""WholeFile: a file that appears whole under its name, or not at all. Knows no format."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file under another name beside `path`; it takes `path`'s place when the block ends well.

    Whatever ends the block otherwise, a kill included, leaves an older file as it was. Raises `OSError`
    with the system's reason. The file can be read by its owner alone.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "there is something by that name which is no file")
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
