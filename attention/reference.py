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
    sinks: NDArray[np.float32] | None = None,
) -> NDArray[np.float64]:
    """Return softmax(cap(scale q k) + mask) v, shape (rows, heads, value_size).

    Shapes: `q` (rows, heads, key_size), `k` (keys, kv_heads, key_size), `v` (keys, kv_heads,
    value_size), `mask` (rows, keys). A row that sees no key is 0.
    """
    weights = attention_weights(q, k, mask, scale=scale, softcap=softcap, sinks=sinks)
    group = q.shape[1] // k.shape[1]
    return np.stack([weights[:, head] @ v[:, head // group] for head in range(q.shape[1])], axis=1)


def attention_weights(
    q: NDArray[np.float32],
    k: NDArray[np.float64],
    mask: NDArray[np.float16],
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: NDArray[np.float32] | None = None,
) -> NDArray[np.float64]:
    """Return the softmax alone, shape (rows, heads, keys); shapes as for `attention`.

    A sink (one score a head, without a value) takes its share, so that the weights sum to less than 1.
    """
    group = q.shape[1] // k.shape[1]
    hidden = np.isneginf(mask)
    weights = np.zeros((q.shape[0], q.shape[1], k.shape[0]))
    for head in range(q.shape[1]):
        scores = q[:, head].astype(np.float64) @ k[:, head // group].T * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        scores = np.where(hidden, -np.inf, scores + np.where(hidden, 0, mask))
        sink = -np.inf if sinks is None else float(sinks[head])
        largest = np.maximum(scores.max(axis=1, keepdims=True), sink)
        largest = np.where(np.isneginf(largest), 0, largest)
        weights[:, head] = np.exp(scores - largest)
        total = weights[:, head].sum(axis=1, keepdims=True) + np.exp(sink - largest)
        weights[:, head] /= np.where(total == 0, 1, total)
    return weights


def tidal_selection(
    weights: NDArray[np.float64],
    mask: NDArray[np.float16],
    *,
    num_keys: int,
    num_first: int,
    num_last: int,
) -> NDArray[np.int32] | None:
    """Return the keys that a selection layer chooses, ascending; None where it stays dense.

    `weights` (rows, heads, keys) are its softmax, `mask` (rows, keys) its mask. Sums over heads and rows;
    each row's first and last visible keys are always taken.
    """
    visible = ~np.isneginf(mask)
    candidates = np.flatnonzero(visible.any(axis=0))
    if len(candidates) <= num_keys:
        return None
    forced: set[int] = set()
    for row in visible:
        seen = np.flatnonzero(row).tolist()
        forced |= {*seen[:num_first], *seen[max(len(seen) - num_last, 0) :]}
    ranked = sorted(set(candidates.tolist()) - forced, key=lambda key: -weights[:, :, key].sum())
    chosen = forced | set(ranked[: max(num_keys - len(forced), 0)])
    return np.array(sorted(chosen), np.int32)


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
