"""llama.cpp's forward pass where it cannot end the process; a model's first one in a process of its own."""

from __future__ import annotations

import ctypes
import functools
import signal
from typing import Any

from lowtide.attention.bindings.library import guarded_aborts, native_library
from lowtide.models.gguf.llama_cpp import llama_library, plain_reason

MESSAGE_BYTES = 1024
TRY_SECONDS = 120
"""The time that a first pass may take: it reads every weight once, on one thread."""
PASS_FAILED = -100
"""The code of a pass that ended with an exception; llama.cpp's own are small numbers."""
FAILED, ENDED, BROKEN = 1, 2, 4


@functools.cache
def install_guarded_passes() -> None:
    """Let every forward pass of this process call llama.cpp through `run_guarded_pass`."""
    with guarded_aborts():
        library = llama_library()
        library.run_pass, library.try_pass = run_guarded_pass, try_pass


def run_guarded_pass(function: str, context: Any, batch: Any) -> int:
    """Call `function`, llama_decode or llama_encode.

    An exception is logged as an error, and `PASS_FAILED` is returned. Where an assertion failed, on whichever thread,
    the context is also declared broken: it computes no more, and is never freed.
    """
    library = llama_library()
    code, message = ctypes.c_int32(), ctypes.create_string_buffer(MESSAGE_BYTES)
    status = _functions().lowtide_run_pass(
        library.address(function),
        ctypes.cast(context, ctypes.c_void_p),
        ctypes.addressof(batch),
        ctypes.byref(code),
        message,
        MESSAGE_BYTES,
    )
    if status == 0:
        return code.value
    library.log_error(_text(message))
    if status == BROKEN:
        library.broken.add(context, plain_reason(_text(message)))
    return PASS_FAILED


def try_pass(function: str, context: Any, batch: Any) -> str | None:
    """Run a pass of `function` in a forked process; return why it failed there, and None where it did not."""
    library = llama_library()
    ended_by, message = ctypes.c_int32(), ctypes.create_string_buffer(MESSAGE_BYTES)
    status = _functions().lowtide_try_pass(
        library.address(function),
        ctypes.cast(context, ctypes.c_void_p),
        ctypes.addressof(batch),
        library.address("llama_set_n_threads"),
        library.address("llama_log_set"),
        TRY_SECONDS,
        ctypes.byref(ended_by),
        message,
        MESSAGE_BYTES,
    )
    if status in (FAILED, BROKEN):
        return plain_reason(_text(message))
    if status == ENDED:
        return signal_in_words(ended_by.value)
    return None


def _text(message: ctypes.Array[ctypes.c_char]) -> str:
    return message.value.decode("utf-8", errors="replace")


def signal_in_words(number: int) -> str:
    """Return how a trial ended by a signal, 0 for an unknown one."""
    if number == signal.SIGALRM:
        return f"it took more than {TRY_SECONDS} s"
    description = signal.strsignal(number) if number else None
    return f"it ended the process ({description or 'for an unknown reason'})"


@functools.cache
def _functions() -> ctypes.CDLL:
    library = native_library()
    pointer, text = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_size_t)
    number = ctypes.POINTER(ctypes.c_int32)
    library.lowtide_run_pass.restype = library.lowtide_try_pass.restype = ctypes.c_int
    library.lowtide_run_pass.argtypes = [pointer, pointer, pointer, number, *text]
    library.lowtide_try_pass.argtypes = [
        *(pointer, pointer, pointer, pointer, pointer, ctypes.c_uint),
        *(number, *text),
    ]
    return library
