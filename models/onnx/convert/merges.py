"""Merges of pairs, found again from the scores of SentencePiece's pieces.

SentencePiece's byte-pair models join the two neighbours whose joint piece has the highest score; a list of
merges that stands in the order of these scores joins the same.
"""

from __future__ import annotations

from collections.abc import Sequence

NORMAL = 1


def merges_by_score(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """Return every pair of normal pieces that are a third one, the highest score first."""
    ids = {
        text: i for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == NORMAL
    }
    found = []
    for whole, token_id in ids.items():
        for end in range(1, len(whole)):
            left, right = whole[:end], whole[end:]
            if left in ids and right in ids:
                found.append((-scores[token_id], token_id, ids[left], ids[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]
