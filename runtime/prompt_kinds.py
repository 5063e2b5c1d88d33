"""Prompts by kind, to measure speculation on: of the package's own, or of a file. Knows no model."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from lowtide.models.errors import BadOption

PARAGRAPH = (
    "The mill stands where the river leaves the wood. In spring the wheel turns day and night, and the "
    "miller sleeps with cotton in his ears. In summer the water is low, and he mends sacks. Nobody has "
    "counted the steps to the loft, for they are never the same."
)
CODE = (
    "def widest(boxes):\n    best = boxes[0]\n    for box in boxes:\n        if box.width > best.width:\n"
    "            best = box\n    return best\n"
)
OWN_PROMPTS: dict[str, list[str]] = {
    "question": ["Why does bread rise?"],
    "writing": ["Write a short letter to a friend who has moved to the sea."],
    "rewrite": [f"Repeat this text word for word, and change river to stream:\n\n{PARAGRAPH}"],
    "quote": [f"Quote the whole text below, in quotation marks:\n\n{PARAGRAPH}"],
    "list": [
        "Continue this list up to item 20:\n"
        + "\n".join(f"Item {n}: sack number {n} is on cart {n}." for n in range(1, 8))
    ],
    "edit code": [f"Rename boxes to crates in this code and print all of it:\n\n{CODE}"],
}


def read_prompts(path: Path, most_of_a_kind: int) -> dict[str, list[str]]:
    """Return the first prompts of each kind in a file: a JSON object a line, with `category` and `turns`.

    Of several turns the first is taken. Raises `BadOption` where it cannot be read so.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    try:
        for line in filter(None, path.read_text(encoding="utf-8").splitlines()):
            entry = json.loads(line)
            if len(kinds[entry["category"]]) < most_of_a_kind:
                kinds[entry["category"]].append(str(entry["turns"][0]))
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise BadOption(
            f"{path} has no prompts that can be read ({error!r}): a JSON object a line is wanted, with "
            '"category" and "turns"'
        ) from error
    if not kinds:
        raise BadOption(f"{path} has no prompts: a JSON object a line is wanted")
    return dict(kinds)
