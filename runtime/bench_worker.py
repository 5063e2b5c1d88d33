"""One case of a benchmark in a process of its own, so that its peak memory is its own.

Reads requests from standard input and answers on standard output, a JSON object a line; started by
`bench`. Knows no other case.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from lowtide.attention.quality import extend
from lowtide.memory.meter import read_process_memory
from lowtide.models.errors import LowtideError
from lowtide.models.header import read_spec
from lowtide.runtime.answer_worker import AnswerWorker
from lowtide.runtime.errors import NotPacked
from lowtide.runtime.loaded_model import LoadedModel
from lowtide.runtime.planning import OpenOptions, plan_spec


class BenchWorker:
    """A loaded model and a prompt of random tokens: time does not depend on what they say."""

    def __init__(self, path: str, options: dict[str, Any]) -> None:
        self._loaded = LoadedModel(plan_spec(read_spec(Path(path)), OpenOptions(**options)))
        if self._loaded.unpacked_reason is not None:
            raise NotPacked(self._loaded.unpacked_reason)
        self._model = self._loaded.model
        numbers = random.Random(0)
        num_tokens = self._model.spec.vocabulary.num_tokens
        self._token_ids = [numbers.randrange(num_tokens) for _ in range(self._model.context)]

    def prefill(self, depth: int) -> dict[str, float]:
        """Compute a prompt of `depth` tokens from nothing."""
        self._model.truncate(0)
        started = time.perf_counter()
        extend(self._model, self._loaded.steering, self._token_ids[:depth])
        return {"seconds": time.perf_counter() - started}

    def decode(self, depth: int, tokens: int) -> dict[str, float]:
        """Compute `tokens` tokens one by one after the first `depth`."""
        steering, following = self._loaded.steering, self._token_ids[depth : depth + tokens]
        extend(self._model, steering, self._token_ids[:depth])
        started = time.perf_counter()
        for token_id in following:
            steering.before_decode()
            self._model.forward((token_id,))
        seconds = time.perf_counter() - started
        self._model.truncate(depth)
        return {"seconds": seconds}

    def facts(self) -> dict[str, Any]:
        """Return what this process took, and what ran."""
        counts = self._loaded.hook_counts()
        return {
            "attention": str(self._loaded.planned.policy),
            "peak_rss_bytes": read_process_memory().peak_bytes,
            "budget_bytes": self._loaded.planned.plan.budget.num_bytes,
            "layers_ours": counts.layers_ours if counts else 0,
            "layers": self._model.spec.num_layers,
            "packed_tensors": len(self._model.spec.packed_tensors),
        }


WORKERS: dict[str, type[BenchWorker] | type[AnswerWorker]] = {
    "open": BenchWorker,
    "open_answers": AnswerWorker,
}
"""What answers the others of a process's requests, by its first one."""


def serve(first: str) -> None:
    """Answer the first line, and what follows on standard input until it ends."""
    worker: BenchWorker | AnswerWorker | None = None
    for line in filter(None, chain((first,), sys.stdin)):
        request = json.loads(line)
        name = request.pop("do")
        try:
            if name in WORKERS:
                worker = WORKERS[name](**request)
                answer: dict[str, Any] = worker.facts()
            else:
                method: Callable[..., dict[str, Any]] = getattr(worker, name)
                answer = method(**request)
        except LowtideError as error:
            answer = {"error": str(error), "exit_code": error.exit_code}
        print(json.dumps(answer), flush=True)
