"""Plain numpy attention in double precision: the oracle that every kernel is held against.

Plain numpy in double precision: attention over reference states and over groups, the oracles of both.

Three granularities of one idea (Qi et al., "DeltaLLM", arXiv 2507.19608; a reconstruction, its construction
rule is not published): behind a window of recent keys a query does not see a key itself but a state that
stands for it, so that what is like something else costs nothing. `reference_states` joins single channels
or blocks of them to the nearest that their page has sent, never to the key before: the error does not walk
away. `page_groups` takes whole rows: like keys of a page share one state."""

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
    """Return softmax(cap(scale q k) + mask) v, shape (rows, heads, value_dim).

    Shapes: `q` (rows, heads, head_dim), `k` (keys, kv_heads, head_dim), `v` (keys, kv_heads,
    value_dim), `mask` (rows, keys). A row that sees no key is 0.
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


PAGE_KEYS = 64
VALUE_SHARE = 0.5
MOST_LIFT = 8.0


def reference_states(
    k: NDArray[np.float64], thresholds: NDArray[np.float64], *, num_first: int, block: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the states that stand for keys, and which blocks were sent, (keys, head_dim / block).

    `k` (keys, head_dim) are one KV head's, `thresholds` (head_dim,) how far a channel may be off: that of
    a query's root mean square, say, divided into a constant. A block of `block` channels is sent where it
    is further from each that was sent before on its page than 1, as the root mean square of its
    differences, each as a multiple of its threshold. Others join the nearest that was sent, and all that
    joined are seen as their mean. The first `num_first` keys are sent whole, and none joins them.
    """
    num_keys, head_dim = k.shape
    states = np.empty_like(k)
    sent = np.empty((num_keys, head_dim // block), bool)
    for begin in range(0, num_keys, PAGE_KEYS):
        page = slice(begin, begin + PAGE_KEYS)
        for first in range(0, head_dim, block):
            channels = slice(first, first + block)
            states[page, channels], sent[page, first // block] = _joined(
                k[page, channels], thresholds[channels], max(num_first - begin, 0)
            )
    return states, sent


def _joined(
    k: NDArray[np.float64], thresholds: NDArray[np.float64], num_whole: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The states of a page's keys in one block of channels, (keys, block), and which of them were sent."""
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
    states = np.stack([k[nearest == leader].mean(axis=0) for leader in nearest])
    return states, nearest == np.arange(len(k))


def delta_attention(
    q: NDArray[np.float32],
    k: NDArray[np.float64],
    v: NDArray[np.float64],
    states: NDArray[np.float64],
    *,
    scale: float,
    window: int,
    page: int = 1,
    refine: float = 0.0,
) -> NDArray[np.float64]:
    """Return attention of the last rows, (rows, heads, value_dim), with states for the keys behind them.

    Shapes as for `reference.attention`; row i of `q` sees all keys but the rows after it, and its last
    `window` keys, its own among them, as they are; of those behind them whole pages of `page` keys as
    states, but for those that get more than the share `refine`, above 0, of the weight of one of a KV head's
    heads.
    """
    num_rows, num_keys = len(q), len(k)
    out = []
    for row in range(num_rows):
        seen = num_keys - num_rows + row + 1
        behind = max(seen - window, 0) // page * page
        keys = np.concatenate([states[:behind], k[behind:seen]])
        if refine:
            much = _most_weights(q[row], keys, scale)[:behind] > refine
            keys[:behind][much] = k[:behind][much]
        visible = np.zeros((1, seen), np.float16)
        out.append(attention(q[row : row + 1], keys, v[:seen], visible, scale=scale)[0])
    return np.stack(out)


def _most_weights(
    q: NDArray[np.float32], keys: NDArray[np.float64], scale: float
) -> NDArray[np.float64]:
    """What each key gets at the most of one row's heads, (keys, kv_heads)."""
    of_heads = q.astype(np.float64).reshape(keys.shape[1], -1, keys.shape[2])
    scores = np.einsum("hgd,khd->hgk", of_heads, keys) * scale
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    most: NDArray[np.float64] = (weights / weights.sum(axis=2, keepdims=True)).max(axis=1).T
    return most


def page_points(
    k: NDArray[np.float64], v: NDArray[np.float64], scales: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return what rows of a page are compared by, (keys, head_dim + value_dim): the keys times `scales`
    (head_dim,), and the values, which vary half as much over the page, in all."""
    points = k * scales
    of_values = v.var(axis=0).sum()
    factor = np.sqrt(VALUE_SHARE * points.var(axis=0).sum() / of_values) if of_values else 0.0
    return np.concatenate([points, v * factor], axis=1)


def page_groups(
    points: NDArray[np.float64], num_groups: int, num_fixed: int = 0
) -> list[list[int]]:
    """Return the groups of a page's rows, (keys, size), each a list of rows, by their first ones.

    Ward's method: joins the two groups whose union raises the sum of squared distances from the means the
    least, until `num_groups` are left. The first `num_fixed` rows stay alone.
    """
    distances = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    distances[np.tril_indices(len(points))] = np.inf
    distances[:num_fixed] = np.inf
    groups = {row: [row] for row in range(len(points))}
    while len(groups) > num_groups:
        first, second = map(int, np.unravel_index(distances.argmin(), distances.shape))
        groups[first] += groups.pop(second)
        distances[second] = distances[:, second] = np.inf
        mean, size = points[groups[first]].mean(axis=0), len(groups[first])
        for other, rows in groups.items():
            if other == first or other < num_fixed:
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
    num_fixed: int = 0,
    lift: float = 0.0,
    refine: float = 0.0,
) -> NDArray[np.float64]:
    """Return attention of the last rows, (rows, heads, value_dim), over groups of one KV head's keys.

    `q` (rows, heads, head_dim), `k` (keys, head_dim), `v` (keys, value_dim). A row sees every key but
    the rows after it; whole pages behind its last `window` keys as groups, each with its mean key and its
    mean value, as heavy as its keys are many, and lifted: see `score_bias`. With `refine` above 0 the keys of
    groups that get more than such a share of a head's weight take their place.
    """
    num_rows, num_keys = len(q), len(k)

    def weights(row: int, groups: list[list[int]]) -> NDArray[np.float64]:
        keys = np.stack([k[rows].mean(axis=0) for rows in groups])
        spread = np.array([(k[rows] * scales).var(axis=0).sum() for rows in groups])
        heavy = np.log([len(rows) for rows in groups])
        heavy += np.minimum(lift * scale**2 * spread, MOST_LIFT)
        return _weights(q[row], keys, heavy, scale)

    pages = []
    for begin in range(0, num_keys - window - PAGE_KEYS + 1, PAGE_KEYS):
        page = slice(begin, begin + PAGE_KEYS)
        of_page = page_groups(
            page_points(k[page], v[page], scales), num_groups, 0 if begin else num_fixed
        )
        pages.append([[begin + key for key in rows] for rows in of_page])
    out = []
    for row in range(num_rows):
        seen = num_keys - num_rows + row + 1
        num_pages = max(seen - window, 0) // PAGE_KEYS
        groups = [rows for page_rows in pages[:num_pages] for rows in page_rows]
        groups += [[key] for key in range(num_pages * PAGE_KEYS, seen)]
        if refine:
            much = weights(row, groups).max(axis=0) > refine
            parts = [
                [[key] for key in rows] if is_much else [rows]
                for rows, is_much in zip(groups, much, strict=True)
            ]
            groups = [rows for of_group in parts for rows in of_group]
        out.append(weights(row, groups) @ np.stack([v[rows].mean(axis=0) for rows in groups]))
    return np.stack(out)


def _weights(
    q: NDArray[np.float32], keys: NDArray[np.float64], heavy: NDArray[np.float64], scale: float
) -> NDArray[np.float64]:
    """What one row's heads give to groups of exp(`heavy`) keys, (heads, groups)."""
    scores = q.astype(np.float64) @ keys.T * scale + heavy
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    result: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return result
