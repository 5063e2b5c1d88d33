"""Plain numpy attention in double precision: the oracle that every kernel is held against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

QUANTISED_BLOCK = 32


def attention(
    q: NDArray[np.float32],
    k: NDArray[np.float64],
    v: NDArray[np.float64],
    mask: NDArray[np.float16],
    *,
    scale: float,
    softcap: float = 0.0,
) -> NDArray[np.float64]:
    """Return softmax(cap(scale q k) + mask) v, shape (rows, heads, value_size).

    Shapes: `q` (rows, heads, key_size), `k` (keys, kv_heads, key_size), `v` (keys, kv_heads,
    value_size), `mask` (rows, keys). A row that sees no key is 0.
    """
    group = q.shape[1] // k.shape[1]
    hidden = np.isneginf(mask)
    out = np.zeros((q.shape[0], q.shape[1], v.shape[2]))
    for head in range(q.shape[1]):
        scores = q[:, head].astype(np.float64) @ k[:, head // group].T * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        scores = np.where(hidden, -np.inf, scores + np.where(hidden, 0, mask))
        largest = scores.max(axis=1, keepdims=True)
        weights = np.exp(scores - np.where(np.isneginf(largest), 0, largest))
        total = weights.sum(axis=1, keepdims=True)
        out[:, head] = weights @ v[:, head // group] / np.where(total == 0, 1, total)
    return out


def quantise_q8_0(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Return the bytes of ggml's q8_0 over the last axis, and the values that they stand for."""
    blocks = values.reshape(*values.shape[:-1], -1, QUANTISED_BLOCK)
    scales = (np.abs(blocks).max(axis=-1, keepdims=True) / 127).astype(np.float16)
    codes = np.round(blocks / np.where(scales == 0, 1, scales)).clip(-127, 127).astype(np.int8)
    packed = np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], axis=-1)
    meant = codes.astype(np.float64) * scales
    return packed.reshape(*values.shape[:-1], -1), meant.reshape(values.shape)


def quantise_q4_0(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Return the bytes of ggml's q4_0 over the last axis, and the values that they stand for."""
    blocks = values.reshape(*values.shape[:-1], -1, QUANTISED_BLOCK)
    scales = (np.abs(blocks).max(axis=-1, keepdims=True) / 7).astype(np.float16)
    codes = np.round(blocks / np.where(scales == 0, 1, scales)).clip(-8, 7)
    nibbles = (codes + 8).astype(np.uint8)
    pairs = nibbles[..., :16] | nibbles[..., 16:] << 4
    packed = np.concatenate([scales.view(np.uint8), pairs], axis=-1)
    meant = codes.astype(np.float64) * scales
    return packed.reshape(*values.shape[:-1], -1), meant.reshape(values.shape)
