"""Attention in plain numpy and double precision: the oracles of all kernels.

`attention` is exact, `tidal_selection` is TidalDecode's. Delta (Qi et al., "DeltaLLM", arXiv 2507.19608; a
reconstruction) has two oracles: `grouped_attention` over groups of whole keys (`page_groups`), and
`delta_attention` over keys whose channel blocks were merged (`reference_blocks`).
"""

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
    """Return softmax(cap(scale q k) + mask) v, shape (queries, heads, value_dim).

    Shapes: `q` (queries, heads, head_dim), `k` (keys, kv_heads, head_dim), `v` (keys,
    kv_heads, value_dim), `mask` (queries, keys). A query that sees no key is 0.
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
    """Return the softmax alone, shape (queries, heads, keys); shapes as for `attention`.

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
    """Return the keys that a selection layer selects, ascending; None if it stays dense.

    `weights` (queries, heads, keys) are its softmax, `mask` (queries, keys) its mask. Keys are ranked by the
    sum over heads and queries; each query's first and last visible keys are always selected.
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
    selected = forced | set(ranked[: max(num_keys - len(forced), 0)])
    return np.array(sorted(selected), np.int32)


def quantise_q8_0(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Return the bytes of ggml's q8_0 over the last axis, and the dequantised values."""
    blocks = values.reshape(*values.shape[:-1], -1, QUANTISED_BLOCK)
    scales = (np.abs(blocks).max(axis=-1, keepdims=True) / 127).astype(np.float16)
    codes = np.round(blocks / np.where(scales == 0, 1, scales)).clip(-127, 127).astype(np.int8)
    packed = np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], axis=-1)
    dequantised = codes.astype(np.float64) * scales
    return packed.reshape(*values.shape[:-1], -1), dequantised.reshape(values.shape)


def quantise_q4_0(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Return the bytes of ggml's q4_0 over the last axis, and the dequantised values."""
    blocks = values.reshape(*values.shape[:-1], -1, QUANTISED_BLOCK)
    scales = (np.abs(blocks).max(axis=-1, keepdims=True) / 7).astype(np.float16)
    codes = np.round(blocks / np.where(scales == 0, 1, scales)).clip(-8, 7)
    nibbles = (codes + 8).astype(np.uint8)
    pairs = nibbles[..., :16] | nibbles[..., 16:] << 4
    packed = np.concatenate([scales.view(np.uint8), pairs], axis=-1)
    dequantised = codes.astype(np.float64) * scales
    return packed.reshape(*values.shape[:-1], -1), dequantised.reshape(values.shape)


PAGE_KEYS = 64
VALUE_SHARE = 0.5
MOST_BIAS = 8.0


def reference_blocks(
    k: NDArray[np.float64], thresholds: NDArray[np.float64], *, num_first: int, block: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the merged keys (keys, head_dim), and which blocks are stored, (keys, head_dim / block).

    `k` (keys, head_dim) are the keys of one KV head, `thresholds` (head_dim,) the tolerance of each channel.
    A block of `block` channels is stored if its distance from each block stored before on its page is above
    1: the root mean square of the differences, each as a multiple of its channel's threshold. Any other
    block is merged into the nearest stored block, and all merged blocks are replaced by their mean. The
    first `num_first` keys are stored whole, and nothing is merged into them.
    """
    num_keys, head_dim = k.shape
    merged = np.empty_like(k)
    stored = np.empty((num_keys, head_dim // block), bool)
    for begin in range(0, num_keys, PAGE_KEYS):
        page = slice(begin, begin + PAGE_KEYS)
        for first in range(0, head_dim, block):
            channels = slice(first, first + block)
            merged[page, channels], stored[page, first // block] = _merged(
                k[page, channels], thresholds[channels], max(num_first - begin, 0)
            )
    return merged, stored


def _merged(
    k: NDArray[np.float64], thresholds: NDArray[np.float64], num_whole: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return a page's merged keys in one block of channels, (keys, block), and which of them are stored."""
    off = np.abs(k[:, None] - k[None])
    scaled = np.where(off == 0, 0.0, off / np.maximum(thresholds, 1e-100))
    apart = np.sqrt((scaled**2).mean(axis=2))
    apart[:, :num_whole] = np.inf
    leaders: list[int] = []
    for key in range(len(k)):
        if key < num_whole or not (apart[key, leaders] <= 1).any():
            leaders.append(key)
    nearest = np.array(leaders)[apart[:, leaders].argmin(axis=1)]
    nearest[leaders] = leaders
    merged = np.stack([k[nearest == leader].mean(axis=0) for leader in nearest])
    return merged, nearest == np.arange(len(k))


def delta_attention(
    q: NDArray[np.float32],
    k: NDArray[np.float64],
    v: NDArray[np.float64],
    merged: NDArray[np.float64],
    *,
    scale: float,
    window: int,
    page: int = 1,
    refine: float = 0.0,
) -> NDArray[np.float64]:
    """Return attention of the last tokens, (queries, heads, value_dim), to merged keys behind a window.

    Shapes as for `attention`. A query sees all keys up to its own; the last `window` of them are exact.
    Behind them, whole pages of `page` keys are merged, except, with `refine` above 0, the keys that get more
    than this share of the weight of some head.
    """
    num_rows, num_keys = len(q), len(k)
    out = []
    for row in range(num_rows):
        seen = num_keys - num_rows + row + 1
        behind = max(seen - window, 0) // page * page
        keys = np.concatenate([merged[:behind], k[behind:seen]])
        if refine:
            much = _most_weights(q[row], keys, scale)[:behind] > refine
            keys[:behind][much] = k[:behind][much]
        visible = np.zeros((1, seen), np.float16)
        out.append(attention(q[row : row + 1], keys, v[:seen], visible, scale=scale)[0])
    return np.stack(out)


def _most_weights(
    q: NDArray[np.float32], keys: NDArray[np.float64], scale: float
) -> NDArray[np.float64]:
    """Return each key's largest weight over one query's heads, (keys, kv_heads)."""
    by_kv_head = q.astype(np.float64).reshape(keys.shape[1], -1, keys.shape[2])
    scores = np.einsum("hgd,khd->hgk", by_kv_head, keys) * scale
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    most: NDArray[np.float64] = (weights / weights.sum(axis=2, keepdims=True)).max(axis=1).T
    return most


def page_points(
    k: NDArray[np.float64], v: NDArray[np.float64], scales: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the points whose distance says how similar a page's keys are, (keys, head_dim + value_dim).

    These are the keys times `scales` (head_dim,), and the values, scaled to half of the keys' variance."""
    points = k * scales
    variance = v.var(axis=0).sum()
    factor = np.sqrt(VALUE_SHARE * points.var(axis=0).sum() / variance) if variance else 0.0
    return np.concatenate([points, v * factor], axis=1)


def page_groups(
    points: NDArray[np.float64], num_groups: int, num_sink_tokens: int = 0
) -> list[list[int]]:
    """Return the groups of a page's points (keys, size), each a list of keys, ordered by their first key.

    Ward's method: it merges the two groups that raise the sum of squared distances from the means least,
    until `num_groups` are left. The first `num_sink_tokens` keys stay alone.
    """
    distances = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    distances[np.tril_indices(len(points))] = np.inf
    distances[:num_sink_tokens] = np.inf
    groups = {row: [row] for row in range(len(points))}
    while len(groups) > num_groups:
        first, second = map(int, np.unravel_index(distances.argmin(), distances.shape))
        groups[first] += groups.pop(second)
        distances[second] = distances[:, second] = np.inf
        mean, size = points[groups[first]].mean(axis=0), len(groups[first])
        for other, rows in groups.items():
            if other == first or other < num_sink_tokens:
                continue
            apart = ((points[rows].mean(axis=0) - mean) ** 2).sum()
            at = (min(first, other), max(first, other))
            distances[at] = 2 * size * len(rows) / (size + len(rows)) * apart
    return [sorted(rows) for _, rows in sorted(groups.items())]


def grouped_attention(
    q: NDArray[np.float32],
    k: NDArray[np.float64],
    v: NDArray[np.float64],
    scales: NDArray[np.float64],
    *,
    scale: float,
    window: int,
    num_groups: int,
    num_sink_tokens: int = 0,
    score_bias: float = 0.0,
    refine: float = 0.0,
) -> NDArray[np.float64]:
    """Return attention of the last tokens, (queries, heads, value_dim), over groups of one KV head's keys.

    `q` (queries, heads, head_dim), `k` (keys, head_dim), `v` (keys, value_dim). A query sees all keys up to
    its own; whole pages behind its last `window` keys are groups, each with its mean key and value, the
    logarithm of its size added to its score, and `score_bias` times its variance. With `refine` above 0,
    groups that get more than this share of some head's weight are replaced by their keys.
    """
    num_rows, num_keys = len(q), len(k)

    def weights(row: int, groups: list[list[int]]) -> NDArray[np.float64]:
        keys = np.stack([k[rows].mean(axis=0) for rows in groups])
        spread = np.array([(k[rows] * scales).var(axis=0).sum() for rows in groups])
        bias = np.log([len(rows) for rows in groups])
        bias += np.minimum(score_bias * scale**2 * spread, MOST_BIAS)
        return _weights(q[row], keys, bias, scale)

    pages = []
    for begin in range(0, num_keys - window - PAGE_KEYS + 1, PAGE_KEYS):
        page = slice(begin, begin + PAGE_KEYS)
        found = page_groups(
            page_points(k[page], v[page], scales), num_groups, 0 if begin else num_sink_tokens
        )
        pages.append([[begin + key for key in rows] for rows in found])
    out = []
    for row in range(num_rows):
        seen = num_keys - num_rows + row + 1
        num_pages = max(seen - window, 0) // PAGE_KEYS
        groups = [rows for page_rows in pages[:num_pages] for rows in page_rows]
        groups += [[key] for key in range(num_pages * PAGE_KEYS, seen)]
        if refine:
            much = weights(row, groups).max(axis=0) > refine
            refined = [
                [[key] for key in rows] if is_much else [rows]
                for rows, is_much in zip(groups, much, strict=True)
            ]
            groups = [rows for keys in refined for rows in keys]
        out.append(weights(row, groups) @ np.stack([v[rows].mean(axis=0) for rows in groups]))
    return np.stack(out)


def _weights(
    q: NDArray[np.float32], keys: NDArray[np.float64], bias: NDArray[np.float64], scale: float
) -> NDArray[np.float64]:
    """Return the weights (heads, groups) of one query, with `bias` (groups,) added to the scores."""
    scores = q.astype(np.float64) @ keys.T * scale + bias
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    result: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return result
