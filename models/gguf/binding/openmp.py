"""How long OpenMP's threads spin before they sleep: set before llama.cpp's library loads it.

GNU's OpenMP spins for milliseconds at every barrier of a graph. If a thread that the others wait for has lost its core,
they keep theirs from it, and from everybody else.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator

SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""What a user may have set: then nothing changes."""
SPINS = {"x86_64": 2000, "AMD64": 2000}
OTHER_SPINS = 30_000
"""Some 30 microseconds: longer than the threads of a pass wait for one another while all of them run. One spin has a
pause instruction on x86-64 and none elsewhere."""


@contextlib.contextmanager
def short_spins() -> Iterator[None]:
    """Let an OpenMP library that is loaded inside the block spin for a short time only.

    The environment is as before afterwards, so that child processes do not inherit the setting.
    """
    if any(name in os.environ for name in SETTINGS):
        yield
        return
    os.environ[SETTINGS[0]] = str(SPINS.get(platform.machine(), OTHER_SPINS))
    try:
        yield
    finally:
        os.environ.pop(SETTINGS[0], None)
