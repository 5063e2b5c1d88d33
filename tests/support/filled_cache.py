"""Fill a model's KV cache with random values through llama.cpp's state calls, without computing a prompt.

Speed and memory do not depend on the values.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import numpy as np

from lowtide.models.gguf.model import GgufModel

HEADER_WORDS = 2  # magic and sequence, as the library wrote them
WORD = 4


def fill_cache(model: GgufModel, num_tokens: int) -> None:
    """Let the cache hold `num_tokens` tokens of random keys and values; f16 caches only."""
    model.truncate(0)
    model.forward((5,))
    state = _grown(_state(model), num_tokens)
    model.truncate(0)
    taken = model._api.llama_state_seq_set_data(
        model._context, (ctypes.c_uint8 * len(state)).from_buffer(state), len(state), 0
    )
    assert taken == len(state), "llama.cpp does not take the state: its format has changed"
    model._num_tokens = num_tokens


def _state(model: GgufModel) -> bytes:
    size = model._api.llama_state_seq_get_size(model._context, 0)
    buffer = (ctypes.c_uint8 * size)()
    assert model._api.llama_state_seq_get_data(model._context, buffer, size, 0) == size
    return bytes(buffer)


def _grown(state: bytes, num_tokens: int) -> bytearray:
    """The state of one token as one of `num_tokens`: streams, cells, then the rows of each layer."""
    streams, cells, _position, sequences, sequence, transposed, layers = struct.unpack_from(
        "<7I", state, HEADER_WORDS * WORD
    )
    assert (streams, cells, sequences, transposed) == (1, 1, 1, 0)
    out = bytearray(state[: HEADER_WORDS * WORD])
    out += struct.pack("<2I", streams, num_tokens)
    meta = np.empty((num_tokens, 3), np.uint32)
    meta[:, 0], meta[:, 1], meta[:, 2] = np.arange(num_tokens), sequences, sequence
    out += meta.tobytes() + struct.pack("<2I", transposed, layers)
    at = (HEADER_WORDS + 7) * WORD
    random = np.random.default_rng(1)
    for _ in range(2 * layers):  # every layer's keys, then every layer's values
        kind, row_bytes = struct.unpack_from("<iQ", state, at)
        at += 12 + row_bytes
        out += struct.pack("<iQ", kind, row_bytes)
        out += _rows(random, num_tokens, row_bytes // 2)
    assert at == len(state)
    return out


def _rows(random: Any, num_tokens: int, width: int) -> bytes:
    block = random.standard_normal((64, width)).astype(np.float16)
    rows: bytes = np.tile(block, (-(-num_tokens // 64), 1))[:num_tokens].tobytes()
    return rows
