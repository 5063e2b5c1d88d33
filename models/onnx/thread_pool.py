"""The one pool of threads that all sessions of a process compute in, once one of them is in pieces.

A pool for each piece would be slower by far: those of the piece before still spin. onnxruntime makes a
shared pool once for a process; from then on it refuses sessions with a pool of their own.
"""

from __future__ import annotations

import contextlib
from typing import Any

from lowtide.models.onnx.libraries import onnx_library

_SPINNING = "session.intra_op.allow_spinning"


class _Pool:
    is_shared = False


def share_threads(threads: int) -> None:
    """Have one pool of `threads`; a pool that is there already stays as it is."""
    with contextlib.suppress(Exception):  # onnxruntime has no class of its own for it
        onnx_library("onnxruntime").set_global_thread_pool_sizes(threads, 1)
    _Pool.is_shared = True


def set_threads(options: Any, threads: int) -> None:
    """Let a session compute in the shared pool, or with `threads` of its own that sleep between passes."""
    if _Pool.is_shared:
        options.use_per_session_threads = False
        return
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry(_SPINNING, "0")
