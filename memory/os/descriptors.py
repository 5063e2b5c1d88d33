"""The standard descriptors of the process: 0, 1 and 2."""

from __future__ import annotations

import contextlib
import os


def hold_standard_descriptors() -> None:
    """Open the null device under each of the descriptors 0 to 2 that is closed.

    A service may be started with closed streams. The next file that is opened, such as a model or a cache,
    would then become the standard output, and native code that reports an error would write into it.
    """
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)
