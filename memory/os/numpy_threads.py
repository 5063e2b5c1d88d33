"""How many threads numpy's matrix library starts: set before numpy loads it.

OpenBLAS starts as many threads as the process may run on, and does not know of a container's CPU quota. The threads
that are too many wait for one another, and each has memory of its own.
"""

from __future__ import annotations

import os
import sys

from lowtide.memory.machine import usable_cores

SETTINGS = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")
"""What a user may have set: then nothing changes."""


def limit_numpy_threads() -> None:
    """Let numpy, if it is not loaded yet, compute with as many threads as lowtide does by default.

    Only the command line calls it: child processes inherit the setting, and a program of the user's has its own.
    """
    if "numpy" not in sys.modules and not any(name in os.environ for name in SETTINGS):
        os.environ[SETTINGS[0]] = str(usable_cores())
