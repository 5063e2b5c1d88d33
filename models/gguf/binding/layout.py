"""Whether a library has the structs that `declarations.py` declares.

llama.cpp changes its parameter structs between versions and does not say so. A library with other structs
loads and runs, but reads flags from the wrong bytes. Its default values show where it has which field.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from typing import Any

from lowtide.models.errors import ModelError
from lowtide.models.gguf.binding.declarations import (
    DEFAULTS,
    VERSION,
    CApi,
    llama_batch,
    llama_context_params,
    llama_model_params,
)

_UNTOUCHED = 0xA5
_ROOM = 256
_BY_POINTER = ("x86_64", "AMD64")
"""Processors whose callers give the address of a large result as the first argument."""


def check_layout(api: CApi, address: Callable[[str], int], name: str) -> None:
    """Raise `ModelError` where the structs of the library called `name` are not those declared."""
    for struct in (llama_model_params, llama_context_params):
        difference = _difference(struct, _default_bytes(struct, address))
        if difference is not None:
            raise _another_version(name, f"its {struct.__name__} has {difference}")
    batch = api.llama_batch_init(2, 0, 1)
    as_declared = _is_new_batch(batch)
    if not as_declared:  # not freed: its pointers are not where this struct has them
        raise _another_version(name, f"its {llama_batch.__name__} has other fields")
    api.llama_batch_free(batch)


def _default_bytes(struct: type[ctypes.Structure], address: Callable[[str], int]) -> bytes:
    """Return the bytes of a default struct, and where that can be seen, those behind it."""
    function = address(struct.__name__.replace("_params", "_default_params"))
    if platform.machine() not in _BY_POINTER:
        return bytes(ctypes.CFUNCTYPE(struct)(function)())
    room = (ctypes.c_uint8 * (ctypes.sizeof(struct) + _ROOM))(
        *[_UNTOUCHED] * (ctypes.sizeof(struct) + _ROOM)
    )
    ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(function)(ctypes.addressof(room))
    return bytes(room)


def _difference(struct: type[ctypes.Structure], found: bytes) -> str | None:
    """Return in words how default values differ from the declared ones; None where they do not."""
    size = ctypes.sizeof(struct)
    if any(byte != _UNTOUCHED for byte in found[size:]):
        return f"more than {size} bytes"
    values: Any = struct.from_buffer_copy(found[:size])
    for field, *_ in struct._fields_:
        value, expected = _number(getattr(values, field)), DEFAULTS[struct].get(field, 0)
        if value != expected:
            return f"{value:g} as {field} instead of {expected:g}"
    return None


def _number(value: Any) -> float:
    """Return a field's value, and 1 for a pointer that is not null."""
    return float(value) if isinstance(value, (int, float)) else float(bool(value))


def _is_new_batch(batch: Any) -> bool:
    filled = all((batch.token, batch.pos, batch.n_seq_id, batch.seq_id, batch.logits))
    return filled and batch.n_tokens == 0 and not batch.embd


def _another_version(name: str, how: str) -> ModelError:
    return ModelError(
        f"{name} has another llama.cpp than lowtide calls ({how}): install the one of "
        f"llama-cpp-python {VERSION}"
    )
