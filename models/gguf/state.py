"""The KV cache of one sequence of llama.cpp, in a file or in memory, and back.

Only what the sequence holds is written and read, a tensor at a time: no copy of it is made but the one
asked for, and cells without a token stay untouched. llama.cpp trusts what it reads: whoever calls
`read_state` or `put_kv` answers for the bytes; `require_tokens` checks what can be before. Knows no
checksum.
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
"""Of a file: magic, version, how many tokens; their numbers follow, four bytes each, and then the cells."""


def write_state(library: LlamaLibrary, context: Any, path: Path, token_ids: Sequence[int]) -> int:
    """Write the tokens and their cells to `path`, and return the file's bytes.

    Raises `SnapshotError` with llama.cpp's reason.
    """
    tokens = (library.api.llama_token * len(token_ids))(*token_ids)
    with library.collected_errors() as errors:
        written = library.api.llama_state_seq_save_file(
            context, os.fsencode(path), SEQUENCE, tokens, len(token_ids)
        )
    # Its last bytes go out when llama.cpp closes the file, and nobody tells whether they did.
    if not written or written != path.stat().st_size:
        raise SnapshotError(_reason(errors, f"only {path.stat().st_size:,} bytes could be written"))
    return int(written)


def require_tokens(
    library: LlamaLibrary, path: Path, num_bytes: int, num_tokens: int, vocabulary: int
) -> None:
    """Check that the first `num_bytes` of a file say that they are the state of `num_tokens` tokens.

    llama.cpp would make room for as many as there are. Raises `SnapshotError` also where one's number is none
    of `vocabulary`; what is of another magic or version is left to llama.cpp, which refuses it.
    """
    with path.open("rb") as file:
        header = file.read(min(num_bytes, _HEADER.size))
        known = (library.api.LLAMA_STATE_SEQ_MAGIC, library.api.LLAMA_STATE_SEQ_VERSION)
        if len(header) < _HEADER.size or _HEADER.unpack(header)[:2] != known:
            return
        _, _, num_held = _HEADER.unpack(header)
        if num_held != num_tokens:
            raise SnapshotError(f"it holds {num_held:,} tokens, {num_tokens:,} are wanted")
        token_bytes = file.read(min(num_bytes - _HEADER.size, 4 * num_tokens))
    if len(token_bytes) != 4 * num_tokens:
        raise SnapshotError(f"it ends before its {num_tokens:,} tokens do")
    token_ids = array("i", token_bytes)
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocabulary:
        raise SnapshotError("it holds tokens that are not in the vocabulary")


def read_state(
    library: LlamaLibrary, context: Any, path: Path, num_bytes: int, capacity: int
) -> list[int]:
    """Put the cells back and return their tokens, at most `capacity`; the sequence must be empty.

    What stands behind the first `num_bytes` of the file is not looked at. Raises `SnapshotError` where
    llama.cpp does not take them; the sequence may then hold anything.
    """
    tokens = (library.api.llama_token * capacity)()
    num_tokens = ctypes.c_size_t()
    with library.collected_errors() as errors:
        read = library.api.llama_state_seq_load_file(
            context, os.fsencode(path), SEQUENCE, tokens, capacity, ctypes.byref(num_tokens)
        )
    _require_whole(library, context, read, num_bytes, num_tokens.value, errors)
    return list(tokens[: num_tokens.value])


def state_bytes(library: LlamaLibrary, context: Any) -> int:
    """Return how many bytes the sequence's cells take as `copy_kv` writes them."""
    return int(library.api.llama_state_seq_get_size(context, SEQUENCE))


def copy_kv(library: LlamaLibrary, context: Any, into: memoryview) -> None:
    """Write the sequence's cells into memory. Raises `SnapshotError` where it is too small for them."""
    with library.collected_errors() as errors:
        written = library.api.llama_state_seq_get_data(context, _pointer(into), len(into), SEQUENCE)
    if written != len(into):
        raise SnapshotError(_reason(errors, f"{written:,} of {len(into):,} bytes were written"))


def put_kv(library: LlamaLibrary, context: Any, state: memoryview, num_tokens: int) -> None:
    """Put the cells of `num_tokens` back; the sequence must be empty.

    Raises `SnapshotError` where llama.cpp does not take them; the sequence may then hold anything.
    """
    with library.collected_errors() as errors:
        read = library.api.llama_state_seq_set_data(context, _pointer(state), len(state), SEQUENCE)
    _require_whole(library, context, read, len(state), num_tokens, errors)


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
    """Where a view's bytes lie. An object that held on to it would keep its memory from being closed."""
    address = ctypes.addressof(ctypes.c_uint8.from_buffer(view))
    return ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))


def _reason(errors: Sequence[str], otherwise: str) -> str:
    return errors[0] if errors else otherwise
