"""The worker process of the paired benchmark: loads one configuration and answers requests.

`PairedBenchmark` starts it. It reads requests from standard input and writes answers to standard output, one
JSON object per line. A process of its own makes its peak memory its own.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from lowtide.attention.evaluation.divergence import extend
from lowtide.memory.process import read_process_memory
from lowtide.models.arguments.names import option
from lowtide.models.errors import BadOption, LowtideError
from lowtide.models.gguf.llama_cpp import llama_library
from lowtide.models.read_spec import read_spec
from lowtide.models.template.families import template_of
from lowtide.runtime.benchmark.schemas.answers import own_answer, peer_answer
from lowtide.runtime.benchmark.schemas.engines import FREE, OURS
from lowtide.runtime.errors import CannotRepack
from lowtide.runtime.generation.chat import PromptEncoder
from lowtide.runtime.generation.loop import DecodeLoop
from lowtide.runtime.generation.state import GenerationRequest, GenerationState
from lowtide.runtime.generation.turns import LastTurn
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.loading.speculation import load_speculation
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.planning.plan import LoadConfig, plan_spec

LIBRARIES: dict[str, Callable[[], object]] = {"llama.cpp": lambda: llama_library().file}
"""What an engine's library came with, if that is not the Python package of its name."""


class Worker:
    """A loaded model; each public method is a request and returns the JSON object of its answer."""

    def __init__(self, path: str, options: dict[str, Any]) -> None:
        self._planned = plan_spec(read_spec(Path(path)), LoadConfig(**options))
        self._engine = Engine(self._planned)
        if self._engine.not_repacked_reason is not None:
            raise CannotRepack(self._engine.not_repacked_reason)
        self._session = self._engine.new_session()
        tokenizer = self._engine.model.tokenizer
        self._template, _ = template_of(self._planned.spec, tokenizer)
        self._encoder = PromptEncoder(tokenizer, self._template, LastTurn())
        numbers = random.Random(0)  # time does not depend on which tokens a prompt has
        num_tokens = self._planned.spec.vocabulary.num_tokens
        self._token_ids = [numbers.randrange(num_tokens) for _ in range(self._engine.model.context)]

    def prefill(self, depth: int) -> dict[str, Any]:
        """Compute a prompt of `depth` tokens with an empty cache."""
        model = self._engine.model
        model.truncate(0)
        started = time.perf_counter()
        extend(model, self._engine.controller, self._token_ids[:depth])
        return {"seconds": time.perf_counter() - started, "tokens": depth}

    def decode(self, depth: int, tokens: int) -> dict[str, Any]:
        """Compute `tokens` tokens one by one behind the first `depth`."""
        model, controller = self._engine.model, self._engine.controller
        extend(model, controller, self._token_ids[:depth])
        started = time.perf_counter()
        for token_id in self._token_ids[depth : depth + tokens]:
            controller.begin_decode()
            model.forward((token_id,))
        seconds = time.perf_counter() - started
        model.truncate(depth)
        return {"seconds": seconds, "tokens": tokens}

    def answer(
        self, prompt: str, tokens: int, template_arguments: dict[str, Any]
    ) -> dict[str, Any]:
        """Answer `prompt` greedily with up to `tokens` tokens, with an empty cache and fresh drafts.

        `seconds` and `tokens` are those of decoding: they start with the second token.
        """
        engine, request = self._engine, self._request(prompt, tokens, template_arguments)
        num_tokens = len(request.token_ids)
        if num_tokens + tokens > engine.most_tokens():
            raise BadOption(
                f"a prompt has {num_tokens} tokens, and {tokens} more do not fit into the context of "
                f"{engine.most_tokens()}: raise {option('context')}"
            )
        self._session.clear()
        self._reset_drafts()
        context = engine.generation_context()
        state = GenerationState(0, request, engine.model, context)
        loop = DecodeLoop(self._session, context)
        loop.add(state)
        chunks = [chunk for _, chunk in loop.run()]
        stats = chunks[-1].stats
        return {
            "seconds": stats.decode_s,
            "tokens": max(stats.generated_tokens - 1, 0),
            "token_ids": [chunk.token_id for chunk in chunks],
            "speculation": stats.speculation,
        }

    def schema_answer(
        self, engine: str, schema: Any, prompt: str, tokens: int, template_arguments: dict[str, Any]
    ) -> dict[str, Any]:
        """Answer `prompt` greedily with up to `tokens` tokens that follow `schema`, held to it by `engine`.

        `first_token_s` starts before the work on the schema; `seconds` are those of the other tokens. Where the engine
        does not take the schema, `refused` says why.
        """
        self._session.clear()
        request = self._request(prompt, tokens, template_arguments)
        most = self._engine.most_tokens() - tokens
        request = replace(request, token_ids=request.token_ids[-most:])
        if engine in (FREE, OURS):
            return own_answer(self._engine, self._session, request, schema, engine)
        answer = peer_answer(self._engine, request, schema, engine)
        self._session.clear()
        return answer

    def _request(
        self, prompt: str, max_tokens: int, arguments: dict[str, Any]
    ) -> GenerationRequest:
        params = SamplingParams(max_tokens=max_tokens, temperature=0)
        most, asked_at = self._engine.most_tokens(), time.perf_counter()
        if self._template is None:
            return self._encoder.encode_text(prompt, most, params, asked_at)
        messages = [{"role": "user", "content": prompt}]
        return self._encoder.encode_chat(messages, most, params, asked_at, arguments=arguments)[0]

    def _reset_drafts(self) -> None:
        """Replace drafts that learn by new ones; a draft model follows the new prompt by itself."""
        config = self._planned.speculation
        if config is not None and config.draft_model is None:
            engine = self._engine
            engine.speculation = load_speculation(
                self._planned, engine.model, engine.controller, engine.ledger
            )

    def facts(self) -> dict[str, Any]:
        """Return the peak memory of the process, and which kernels run."""
        spec, counts = self._planned.spec, self._engine.kernel_counts()
        library = LIBRARIES.get(spec.engine, lambda: f"{spec.engine} {version(spec.engine)}")()
        attention = self._planned.attention_in_words
        return {
            "policy": str(self._planned.policy),
            "engine": f"{spec.engine} ({library}), attention: {attention}",
            "peak_rss_bytes": read_process_memory().peak_bytes,
            "layers_native": counts.layers_native if counts else 0,
            "layers": spec.num_layers,
            "repacked_tensors": len(self._engine.model.spec.repacked_tensors),
        }


def serve(first: str) -> None:
    """Answer the first line, which must be "open", and the lines on standard input until it ends."""
    worker: Worker | None = None
    for line in filter(None, chain((first,), sys.stdin)):
        request = json.loads(line)
        name = request.pop("do")
        try:
            if name == "open":
                worker = Worker(**request)
                reply: dict[str, Any] = worker.facts()
            else:
                method: Callable[..., dict[str, Any]] = getattr(worker, name)
                reply = method(**request)
        except LowtideError as error:
            reply = {"error": str(error), "exit_code": error.exit_code}
        print(json.dumps(reply), flush=True)
