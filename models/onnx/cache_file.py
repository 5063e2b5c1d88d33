"""The KV cache of an ONNX model in a file: its tokens and their cells, part by part, and back.

Parts are written from where they lie and read to where they belong: no copy of them is made, and cells
without a token stay untouched. Knows no checksum.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from pathlib import Path

from lowtide.models.errors import StateError
from lowtide.models.onnx.token_cache import TokenCache

MAGIC, VERSION = b"onnx-kv\0", 1
_HEADER = struct.Struct("<8sII")
"""Magic, version, how many tokens; their numbers follow, four bytes each, and then the cells."""
_ID_BYTES = array("i").itemsize


def write_cells(path: Path, token_ids: Sequence[int], cache: TokenCache) -> int:
    """Write the tokens and their cells, and return the file's bytes.

    Raises `StateError` with the system's reason.
    """
    try:
        with path.open("wb") as file:
            file.write(_HEADER.pack(MAGIC, VERSION, len(token_ids)))
            file.write(array("i", token_ids))
            for part in cache.rows(len(token_ids)):
                file.write(part)
            return file.tell()
    except OSError as error:
        raise StateError(error.strerror or str(error)) from None


def read_cells(
    path: Path, num_bytes: int, cache: TokenCache, *, num_tokens: int, vocabulary: int
) -> list[int]:
    """Read the cells of `num_tokens` from the first `num_bytes` of a file, and return its tokens.

    Raises `StateError` where the file has others, or another number of bytes; cells may then hold anything.
    """
    num_id_bytes = num_tokens * _ID_BYTES
    wanted = _HEADER.size + num_id_bytes + cache.num_bytes(num_tokens)
    try:
        with path.open("rb") as file:
            header = file.read(min(num_bytes, _HEADER.size))
            _check_header(header, num_tokens)
            if num_bytes != wanted:
                raise StateError(f"it has {num_bytes:,} bytes, {wanted:,} are wanted")
            id_bytes = file.read(num_id_bytes)
            if len(id_bytes) < num_id_bytes:
                raise StateError(f"it ends before its {num_tokens:,} tokens do")
            token_ids = array("i", id_bytes)
            if not all(0 <= token_id < vocabulary for token_id in token_ids):
                raise StateError("it holds tokens that are not in the vocabulary")
            for part in cache.rows(num_tokens):
                if file.readinto(part) != part.nbytes:
                    raise StateError("it ends before its cells do")
    except OSError as error:
        raise StateError(error.strerror or str(error)) from None
    return token_ids.tolist()


def _check_header(header: bytes, num_tokens: int) -> None:
    if len(header) < _HEADER.size or _HEADER.unpack(header)[:2] != (MAGIC, VERSION):
        raise StateError("it is no KV cache of an ONNX model, or one of another version")
    num_held = _HEADER.unpack(header)[2]
    if num_held != num_tokens:
        raise StateError(f"it holds {num_held:,} tokens, {num_tokens:,} are wanted")
