"""Saves the KV cache of one llama.cpp sequence to a file or to memory, and loads it.

Only slots that hold tokens are written and read, one tensor at a time and without another copy. llama.cpp
trusts what it reads: the caller of `read_state` or `put_kv` is responsible for the bytes (sessions verify a
checksum); `require_tokens` checks what can be checked before.
"""

from __future__ import annotations

import ctypes
import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowtide.models.errors import SnapshotError
from lowtide.models.gguf.llama_cpp import LlamaLibrary

SEQUENCE = 0
_HEADER = struct.Struct("=III")
"""Magic, version, number of tokens; the token ids follow, four bytes each, and then the slots."""


def write_state(library: LlamaLibrary, context: Any, path: Path, token_ids: Sequence[int]) -> int:
    """Write the tokens with their keys and values to `path`; return the file's size in bytes.

    Raises `SnapshotError` with llama.cpp's reason.
    """
    tokens = (library.api.llama_token * len(token_ids))(*token_ids)
    with library.collected_errors() as errors:
        written = library.api.llama_state_seq_save_file(
            context, os.fsencode(path), SEQUENCE, tokens, len(token_ids)
        )
    # llama.cpp writes the last bytes when it closes the file and ignores whether that worked.
    if not written or written != path.stat().st_size:
        raise SnapshotError(_reason(errors, f"only {path.stat().st_size:,} bytes could be written"))
    return int(written)


def require_tokens(
    library: LlamaLibrary, path: Path, num_bytes: int, num_tokens: int, vocabulary: int
) -> None:
    """Check that the first `num_bytes` of a file are a snapshot of `num_tokens` tokens, by its header.

    llama.cpp would allocate room for as many tokens as the header claims. Raises `SnapshotError` also for a
    token outside `vocabulary`. A file with another magic or version is left to llama.cpp, which refuses it.
    """
    with path.open("rb") as file:
        header = file.read(min(num_bytes, _HEADER.size))
        known = (library.api.LLAMA_STATE_SEQ_MAGIC, library.api.LLAMA_STATE_SEQ_VERSION)
        if len(header) < _HEADER.size or _HEADER.unpack(header)[:2] != known:
            return
        _, _, num_held = _HEADER.unpack(header)
        if num_held != num_tokens:
            raise SnapshotError(f"it holds {num_held:,} tokens instead of {num_tokens:,}")
        token_bytes = file.read(min(num_bytes - _HEADER.size, 4 * num_tokens))
    if len(token_bytes) != 4 * num_tokens:
        raise SnapshotError(f"it ends before its {num_tokens:,} tokens do")
    token_ids = array("i", token_bytes)
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocabulary:
        raise SnapshotError("it holds tokens that are not in the vocabulary")


def read_state(
    library: LlamaLibrary, context: Any, path: Path, num_bytes: int, capacity: int
) -> list[int]:
    """Load the first `num_bytes` of a file and return its tokens, at most `capacity`.

    The sequence must be empty. Raises `SnapshotError` where llama.cpp refuses the file; the sequence may then
    hold anything.
    """
    tokens = (library.api.llama_token * capacity)()
    num_tokens = ctypes.c_size_t()
    with library.collected_errors() as errors:
        read = library.api.llama_state_seq_load_file(
            context, os.fsencode(path), SEQUENCE, tokens, capacity, ctypes.byref(num_tokens)
        )
    _require_whole(library, context, read, num_bytes, num_tokens.value, errors)
    return list(tokens[: num_tokens.value])


def snapshot_bytes(library: LlamaLibrary, context: Any) -> int:
    """Return how many bytes `copy_kv` writes for the sequence."""
    return int(library.api.llama_state_seq_get_size(context, SEQUENCE))


def copy_kv(library: LlamaLibrary, context: Any, into: memoryview) -> None:
    """Copy the sequence's slots into memory; raise `SnapshotError` where it has another size."""
    with library.collected_errors() as errors:
        written = library.api.llama_state_seq_get_data(context, _pointer(into), len(into), SEQUENCE)
    if written != len(into):
        raise SnapshotError(
            _reason(errors, f"only {written:,} of {len(into):,} bytes were written")
        )


def put_kv(library: LlamaLibrary, context: Any, snapshot: memoryview, num_tokens: int) -> None:
    """Restore a copy of `num_tokens` tokens; the sequence must be empty.

    Raises `SnapshotError` where llama.cpp refuses it; the sequence may then hold anything.
    """
    with library.collected_errors() as errors:
        read = library.api.llama_state_seq_set_data(
            context, _pointer(snapshot), len(snapshot), SEQUENCE
        )
    _require_whole(library, context, read, len(snapshot), num_tokens, errors)


def _require_whole(
    library: LlamaLibrary,
    context: Any,
    read: int,
    num_bytes: int,
    num_tokens: int,
    errors: Sequence[str],
) -> None:
    memory = library.api.llama_get_memory(context)
    first = library.api.llama_memory_seq_pos_min(memory, SEQUENCE)
    last = library.api.llama_memory_seq_pos_max(memory, SEQUENCE)
    if not read or read != num_bytes or last != num_tokens - 1:
        raise SnapshotError(_reason(errors, f"it holds positions {first} to {last}"))


def _pointer(view: memoryview) -> Any:
    """Return the address of a view's bytes without keeping the view: that would keep its buffer from closing."""
    address = ctypes.addressof(ctypes.c_uint8.from_buffer(view))
    return ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))


def _reason(errors: Sequence[str], otherwise: str) -> str:
    return errors[0] if errors else otherwise
