"""BatchAnswers: the part of a runtime that answers several prompts together. Knows no loop."""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from lowtide.memory.plan.batch import BatchPlan
from lowtide.memory.plan.line import BATCH
from lowtide.models.errors import BadOption
from lowtide.runtime.batch.batch import BatchPrompt, BatchSequence, generate_together
from lowtide.runtime.batch.memory import BatchMemory, batch_plans, why_not_drafted
from lowtide.runtime.batch.speculation import BatchSpeculation, load_batch_speculation
from lowtide.runtime.generation.chat import fit_tokens
from lowtide.runtime.generation.generate import (
    GenerationChunk,
    GenerationContext,
    GenerationResult,
    Prompt,
)
from lowtide.runtime.kv.session import KVSession
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.profiling.profiler import Profiler
from lowtide.runtime.speculation.speculator import Speculator

MOST_SEQUENCES = 256
"""llama.cpp knows no more in one cache."""
CELLS_DIFFER = "llama.cpp keeps keys of this model in other cells than those of other models"
OptionsOfAll = SamplingParams | Sequence[SamplingParams] | None


class BatchAnswers(ABC):
    """What `Runtime` is made of for batches: its model, its session, and which answer goes on."""

    _loaded: Engine
    _session: KVSession
    _profiler: Profiler
    _stepping: threading.RLock
    _room: BatchMemory | None = None

    @abstractmethod
    def _begin(self) -> int: ...

    @abstractmethod
    def _check_text(self, text: str) -> None: ...

    @abstractmethod
    def _check_goes_on(self, answer: int) -> None: ...

    def generate_batch(
        self, prompts: Sequence[str], options: OptionsOfAll = None, **named: Any
    ) -> list[GenerationResult]:
        """Continue all prompts together, a pass for all of them a step; return the results in their order.

        `options` for all, or a list with those of each; `named` as in `SamplingParams`, for all. What
        all prompts begin with is read and kept once. Greedy answers are those of each prompt alone, token
        for token, where `stats.batch["identical"]` says so. Takes memory beside the plan's, inside the
        budget: the KV cache of all tokens that are asked for. Raises `OverBudget` before anything is
        allocated where there is no room, `BadOption` where the model or the attention computes one
        sequence at a time. Where the runtime speculates, each answer has drafts of its own, and a pass
        verifies those of all; a draft model drafts nothing here.
        """
        collected: list[list[GenerationChunk]] = [[] for _ in prompts]
        for index, piece in self.stream_batch(prompts, options, **named):
            collected[index].append(piece)
        return [GenerationResult.of(iter(pieces)) for pieces in collected]

    def stream_batch(
        self, prompts: Sequence[str], options: OptionsOfAll = None, **named: Any
    ) -> Generator[tuple[int, GenerationChunk], None, None]:
        """Yield what `generate_batch` collects, as it comes: the prompt's index and a piece of its answer.

        Closing the iterator stops all answers and leaves the runtime usable.
        """
        asked_at = time.perf_counter()
        chosen = _options_of(prompts, options, named)
        for one in chosen:
            self._loaded.check(one, is_completion=True)
        self._check_can(len(prompts))
        answer = self._begin()
        asked = [self._asked(*one, asked_at) for one in zip(prompts, chosen, strict=True)]
        return self._together(answer, asked) if asked else _nothing()

    def _asked(self, text: str, options: SamplingParams, asked_at: float) -> BatchPrompt:
        self._check_text(text)
        model = self._loaded.model
        with self._profiler.span("tokenise"):
            token_ids = model.tokenizer.encode(text, add_special=True, parse_special=False)
        if not token_ids:
            raise BadOption("a prompt is empty, and this model adds no token: write one")
        kept, dropped = fit_tokens(token_ids, model.context, options)
        return BatchPrompt(
            Prompt(token_ids=kept, asked_at=asked_at, dropped_tokens=dropped), options
        )

    def _check_can(self, num_prompts: int) -> None:
        """Raise `BadOption` where the model or its attention computes one sequence at a time."""
        model, policy = self._loaded.model, self._loaded.planned.policy
        if not model.supports_batch:
            raise BadOption(
                f"a batch of {num_prompts} prompts is wanted, and {model.spec.name} computes one sequence "
                f"at a time ({_why_alone(self._loaded)}): ask one prompt after another"
            )
        if not policy.supports_batch:
            raise BadOption(
                f"a batch of {num_prompts} prompts is wanted, and {policy.name} chooses or filters keys of "
                "one sequence: open with attention='dense' or 'llama', or ask one prompt after another"
            )
        most = min(model.batch_size, MOST_SEQUENCES)
        if num_prompts > most:
            raise BadOption(
                f"a batch of {num_prompts} prompts is wanted, a pass takes {most} rows: ask fewer at once"
                + (", or raise batch_size" if most < MOST_SEQUENCES else "")
            )

    def _together(
        self, answer: int, asked: Sequence[BatchPrompt]
    ) -> Generator[tuple[int, GenerationChunk], None, None]:
        loaded = self._loaded
        room = self._room = self._room or BatchMemory(loaded, self._session)
        plan = room.largest(batch_plans(loaded.planned, loaded.model, asked))
        with contextlib.ExitStack() as stack:
            with self._stepping:
                self._check_goes_on(answer)
                sequences = stack.enter_context(room.opened(plan))
                speculation = load_batch_speculation(
                    loaded.planned, plan, sequences, loaded.controller
                )
                if speculation is not None:
                    stack.callback(speculation.close)
            facts = self._facts(plan, room, speculation, asked)
            drafting = speculation.members if speculation is not None else [None] * len(asked)
            pieces = generate_together(
                sequences,
                [
                    BatchSequence(index, one, loaded.model, facts, drafts)
                    for index, (one, drafts) in enumerate(zip(asked, drafting, strict=True))
                ],
                plan.shared_tokens,
                loaded.controller,
                facts.watchdog,
                speculation,
                self._profiler,
            )
            while True:
                with self._stepping:
                    self._check_goes_on(answer)
                    piece = next(pieces, None)
                if piece is None:
                    return
                if room.cells_differ:
                    _tell_cells_differ(facts.batch, piece[1].stats.speculation)
                yield piece

    def _end_batch(self) -> None:
        """Give back what a batch holds; it ends with an error where it is read on after all."""
        if self._room is not None:
            with self._stepping:
                self._room.close()

    def _facts(
        self,
        plan: BatchPlan,
        room: BatchMemory,
        speculation: BatchSpeculation | None,
        asked: Sequence[BatchPrompt],
    ) -> GenerationContext:
        loaded, alone = self._loaded, self._loaded.generation_context()
        rows_agree = room.rows_agree(plan.num_sequences)
        if speculation is not None:
            rows_agree = rows_agree and speculation.rows_agree
        reason = loaded.planned.backend.batch_nondeterminism(
            loaded.planned, rows_agree=rows_agree, exact_prefill=loaded.controller.exact_prefill
        )
        told = {
            "sequences": plan.num_sequences,
            "shared_tokens": plan.shared_tokens,
            "kv_tokens": plan.num_cells,
            "num_bytes": plan.num_bytes,
            "identical": reason is None,
            "nondeterminism": reason,
        }
        planned_bytes = alone.planned_bytes + loaded.ledger.components[BATCH]
        speculator = None
        if loaded.planned.speculation is not None and speculation is None:
            speculator = Speculator.without(why_not_drafted(loaded.planned, loaded.model, asked))
        return replace(alone, speculator=speculator, batch=told, planned_bytes=planned_bytes)


def _tell_cells_differ(*told: dict[str, Any] | None) -> None:
    for values in told:
        if values is not None:
            values.update(identical=False, nondeterminism=CELLS_DIFFER)


def _options_of(
    prompts: Sequence[str], options: OptionsOfAll, named: dict[str, Any]
) -> list[SamplingParams]:
    if isinstance(prompts, str):
        raise BadOption("prompts is one text, a list of them is wanted: write [prompt]")
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise BadOption("prompts has something that is no text: a list of texts is wanted")
    if options is None or isinstance(options, SamplingParams):
        return [SamplingParams.of(options, **named)] * len(prompts)
    if len(options) != len(prompts):
        raise BadOption(
            f"{len(options)} options are given for {len(prompts)} prompts: give one each, or one for all"
        )
    return [SamplingParams.of(one, **named) for one in options]


def _why_alone(loaded: Engine) -> str:
    if loaded.planned.plan.gpus:
        return "some of its layers are on a device"
    if loaded.planned.spec.recurrent_state_bytes:
        return "its state cannot be shared"
    return f"{loaded.planned.spec.engine} runs it so"


def _nothing() -> Generator[tuple[int, GenerationChunk], None, None]:
    yield from ()
