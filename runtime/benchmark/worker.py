"""One case of a benchmark in a process of its own, so that its peak memory is its own.

Reads requests from standard input and answers on standard output, a JSON object a line; started by
`bench`. Knows no other case.

One side of a benchmark of answers, in a process of its own; started as `bench_worker` is.

Knows no other side."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from lowtide.attention.evaluation.divergence import extend
from lowtide.memory.process import read_process_memory
from lowtide.models.chat_template import ChatTemplate
from lowtide.models.errors import BadOption, LowtideError
from lowtide.models.read_spec import read_spec
from lowtide.runtime.errors import CannotRepack
from lowtide.runtime.generation.chat import ChatEncoder, LastTurn
from lowtide.runtime.generation.generate import Prompt, generate
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.loading.speculation import load_speculator
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.planning.plan import LoadConfig, plan_spec


class AnswerWorker:
    """A loaded model that answers prompts greedily; each as if it were the first."""

    def __init__(self, path: str, options: dict[str, Any]) -> None:
        self._planned = plan_spec(read_spec(Path(path)), LoadConfig(**options))
        self._loaded = Engine(self._planned)
        self._session = self._loaded.new_session()

    def answer(self, prompt: str, tokens: int) -> dict[str, Any]:
        """Answer with up to `tokens` tokens: the seconds of decoding, the tokens, and what was drafted."""
        loaded, token_ids = self._loaded, self._prompt_ids(prompt)
        if len(token_ids) + tokens > loaded.most_tokens():
            raise BadOption(
                f"a prompt has {len(token_ids)} tokens, and {tokens} more do not fit the context of "
                f"{loaded.most_tokens()}: raise --context"
            )
        self._session.forget()
        self._forget_drafts()
        pieces = list(
            generate(
                loaded.model,
                self._session,
                Prompt(token_ids=token_ids, asked_at=time.perf_counter()),
                SamplingParams(max_tokens=tokens, temperature=0),
                loaded.generation_context(),
            )
        )
        stats = pieces[-1].stats
        return {
            "seconds": stats.decode_s,
            "token_ids": [piece.token_id for piece in pieces],
            "decoded": max(stats.generated_tokens - 1, 0),
            "speculation": stats.speculation,
        }

    def _prompt_ids(self, prompt: str) -> list[int]:
        spec, tokenizer = self._planned.spec, self._loaded.model.tokenizer
        if spec.chat_template is None:
            return tokenizer.encode(prompt, add_special=True, parse_special=False)
        template = ChatTemplate(spec.chat_template, tokenizer.special_texts)
        conversation = ChatEncoder(template, tokenizer, LastTurn())
        messages = [{"role": "user", "content": prompt}]
        return conversation.prompt_ids(conversation.render(messages), messages)

    def _forget_drafts(self) -> None:
        """Drafts that learn begin anew; a draft model goes back by itself."""
        wish = self._planned.speculation
        if wish is not None and wish.draft_model is None:
            loaded = self._loaded
            loaded.speculator = load_speculator(self._planned, loaded.model, loaded.controller)

    def facts(self) -> dict[str, Any]:
        """Return what this process took."""
        return {
            "attention": str(self._planned.policy),
            "peak_rss_bytes": read_process_memory().peak_bytes,
        }


class BenchWorker:
    """A loaded model and a prompt of random tokens: time does not depend on what they say."""

    def __init__(self, path: str, options: dict[str, Any]) -> None:
        self._loaded = Engine(plan_spec(read_spec(Path(path)), LoadConfig(**options)))
        if self._loaded.not_repacked_reason is not None:
            raise CannotRepack(self._loaded.not_repacked_reason)
        self._model = self._loaded.model
        numbers = random.Random(0)
        num_tokens = self._model.spec.vocabulary.num_tokens
        self._token_ids = [numbers.randrange(num_tokens) for _ in range(self._model.context)]

    def prefill(self, depth: int) -> dict[str, float]:
        """Compute a prompt of `depth` tokens from nothing."""
        self._model.truncate(0)
        started = time.perf_counter()
        extend(self._model, self._loaded.controller, self._token_ids[:depth])
        return {"seconds": time.perf_counter() - started}

    def decode(self, depth: int, tokens: int) -> dict[str, float]:
        """Compute `tokens` tokens one by one after the first `depth`."""
        controller, following = self._loaded.controller, self._token_ids[depth : depth + tokens]
        extend(self._model, controller, self._token_ids[:depth])
        started = time.perf_counter()
        for token_id in following:
            controller.begin_decode()
            self._model.forward((token_id,))
        seconds = time.perf_counter() - started
        self._model.truncate(depth)
        return {"seconds": seconds}

    def facts(self) -> dict[str, Any]:
        """Return what this process took, and what ran."""
        counts = self._loaded.kernel_counts()
        return {
            "attention": str(self._loaded.planned.policy),
            "peak_rss_bytes": read_process_memory().peak_bytes,
            "budget_bytes": self._loaded.planned.plan.budget.num_bytes,
            "layers_native": counts.layers_native if counts else 0,
            "layers": self._model.spec.num_layers,
            "repacked_tensors": len(self._model.spec.repacked_tensors),
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
