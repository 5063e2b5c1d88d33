"""lowtide with its default options."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from lowtide.memory.units import GIB
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

from .worker import THREADS


class Own:
    """The model's forward passes, of as many tokens as the plan chose.

    `PEERS_OPTIONS` is a JSON object of other options of a plan.
    """

    def __init__(self, path: Path, context: int) -> None:
        defaults = {"memory": 8 * GIB, "context": context, "threads": THREADS}
        config = LoadConfig(**{**defaults, **json.loads(os.environ.get("PEERS_OPTIONS", "{}"))})
        self.loaded = Engine(plan_reference(path, config))
        self.model = self.loaded.model

    def answer(self, token_ids: list[int], tokens: int) -> list[float]:
        """Read the prompt and decode."""
        self.model.truncate(0)
        self.loaded.controller.begin_prefill()
        rows = self.model.batch_size
        for at in range(0, len(token_ids), rows):
            logits = self.model.forward(token_ids[at : at + rows])
        token, times = int(logits.argmax()), [time.perf_counter()]
        while len(times) < tokens:
            self.loaded.controller.begin_decode()
            token = int(self.model.forward((token,)).argmax())
            times.append(time.perf_counter())
        return times


def open_engine(path: Path, context: int) -> Own:
    """Open a GGUF file or an ONNX folder."""
    return Own(path, context)
