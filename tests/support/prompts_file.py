"""Prompts by kind, from a file that is not in the repository, for the benchmarks of speculation."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path

import pytest


def prompts_by_kind(per_kind: int) -> dict[str, list[str]]:
    """Return the first prompts of each kind in the file that LOWTIDE_PROMPTS names; LOWTIDE_PER_KIND is how many.

    Without a file the benchmark is skipped.
    """
    path = os.environ.get("LOWTIDE_PROMPTS")
    if path is None:
        pytest.skip("LOWTIDE_PROMPTS names no file of prompts")
    kinds: dict[str, list[str]] = defaultdict(list)
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        kinds[entry["category"]].append(entry["turns"][0])
    limit = int(os.environ.get("LOWTIDE_PER_KIND", per_kind))
    return {kind: prompts[:limit] for kind, prompts in kinds.items()}
