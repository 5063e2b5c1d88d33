"""Plain numpy in double precision: attention over reference states and over groups, the oracles of both.

Three granularities of one idea (Qi et al., "DeltaLLM", arXiv 2507.19608; a reconstruction, its construction
rule is not published): behind a window of recent keys a query does not see a key itself but a state that
stands for it, so that what is like something else costs nothing. `reference_states` joins single channels
or blocks of them to the nearest that their page has sent, never to the key before: the error does not walk
away. `page_groups` takes whole rows: like keys of a page share one state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lowtide.attention.reference import attention

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAGE_KEYS = 64
VALUE_SHARE = 0.5
MOST_LIFT = 8.0


def reference_states(
    k: NDArray[np.float64], thresholds: NDArray[np.float64], *, num_first: int, block: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the states that stand for keys, and which blocks were sent, (keys, key_size / block).

    `k` (keys, key_size) are one KV head's, `thresholds` (key_size,) how far a channel may be off: that of
    a query's root mean square, say, divided into a constant. A block of `block` channels is sent where it
    is further from each that was sent before on its page than 1, as the root mean square of its
    differences, each as a multiple of its threshold. Others join the nearest that was sent, and all that
    joined are seen as their mean. The first `num_first` keys are sent whole, and none joins them.
    """
    num_keys, key_size = k.shape
    states = np.empty_like(k)
    sent = np.empty((num_keys, key_size // block), bool)
    for begin in range(0, num_keys, PAGE_KEYS):
        page = slice(begin, begin + PAGE_KEYS)
        for first in range(0, key_size, block):
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
    opens: float = 0.0,
) -> NDArray[np.float64]:
    """Return attention of the last rows, (rows, heads, value_size), with states for the keys behind them.

    Shapes as for `reference.attention`; row i of `q` sees all keys but the rows after it, and its last
    `window` keys, its own among them, as they are; of those behind them whole pages of `page` keys as
    states, but for those that get more than the share `opens`, above 0, of the weight of one of a KV head's
    heads.
    """
    num_rows, num_keys = len(q), len(k)
    out = []
    for row in range(num_rows):
        seen = num_keys - num_rows + row + 1
        behind = max(seen - window, 0) // page * page
        keys = np.concatenate([states[:behind], k[behind:seen]])
        if opens:
            much = _most_weights(q[row], keys, scale)[:behind] > opens
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
    """Return what rows of a page are compared by, (keys, key_size + value_size): the keys times `scales`
    (key_size,), and the values, which vary half as much over the page, in all."""
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
    opens: float = 0.0,
) -> NDArray[np.float64]:
    """Return attention of the last rows, (rows, heads, value_size), over groups of one KV head's keys.

    `q` (rows, heads, key_size), `k` (keys, key_size), `v` (keys, value_size). A row sees every key but
    the rows after it; whole pages behind its last `window` keys as groups, each with its mean key and its
    mean value, as heavy as its keys are many, and lifted: see `lifts`. With `opens` above 0 the keys of
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
        if opens:
            much = weights(row, groups).max(axis=0) > opens
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
