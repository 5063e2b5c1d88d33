"""Runtime: open a model inside a budget, ask it, close it. Knows how parts fit, none of their insides."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowtide.attention.policy import AttentionPolicy
from lowtide.memory.budget import Ledger
from lowtide.memory.plan.estimates import prompt_limit_bytes
from lowtide.memory.plan.plan import MemoryPlan
from lowtide.memory.reclaim import Reclaimer
from lowtide.models.chat_template import ChatTemplate, Message
from lowtide.models.errors import BadOption
from lowtide.models.model import Model
from lowtide.models.spec import ModelSpec
from lowtide.runtime.batch.api import BatchAnswers
from lowtide.runtime.errors import PromptTooLong, RuntimeUnusable
from lowtide.runtime.generation.chat import (
    ChatEncoder,
    ChatPrompt,
    LastTurn,
    fit_messages,
    fit_tokens,
)
from lowtide.runtime.generation.generate import GenerationChunk, GenerationResult, Prompt, generate
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.planning.plan import LoadConfig, ResolvedModel, plan_model, plan_reference
from lowtide.runtime.profiling.profiler import SILENT, Profiler
from lowtide.runtime.profiling.retention_map import RetainedSpan
from lowtide.runtime.sessions.store import SavedChats


class Runtime(BatchAnswers):
    """A loaded model that answers inside its plan; made by `Runtime.open`, used as a context manager.

    One answer or batch at a time: another ends it. Not for several threads; one in each is fine.
    """

    def __init__(self, loaded: Engine, profiler: Profiler = SILENT) -> None:
        self._loaded = loaded
        self._profiler = profiler
        self._model = loaded.model
        self._session = loaded.new_session()
        self._last = LastTurn()
        loaded.reclaimers.insert(0, Reclaimer("complete", self._session.forget))
        self._conversation: ChatEncoder | None = None
        self._answer = 0
        self._lock = threading.Lock()
        self._stepping = threading.RLock()
        self._closed = False
        self._store = SavedChats(
            loaded, self._session, self._last, begin=self._begin, require_open=self._require_open
        )

    @classmethod
    def open(
        cls,
        model: str | Path | Model | None = None,
        *,
        memory: str | int | None = None,
        context: int | None = None,
        kv_type: str | None = None,
        batch_size: int | None = None,
        threads: int | None = None,
        attention: str | AttentionPolicy = "llama",
        prefix_cache: str | int = 0,
        repack: bool = False,
        gpu_layers: int | str | None = None,
        gpu_memory: str | int | None = None,
        speculate: str = "off",
        provider: str = "cpu",
        offline: bool = False,
        profiler: Profiler | None = None,
    ) -> Runtime:
        """Plan and load a model so that the whole process stays at or under `memory`.

        `model` is a path, a name ("smollm2"), "hf:user/repo:Q4_K_M", a `Model` of your own, or None for
        the default model. `memory` is a size such as "1GiB" or "50%" of what is available; None is
        80 %. `context` None is the longest that fits. `attention` is "llama" (the engine's kernels),
        "dense" (lowtide's, exact), or an approximation: "tidal", "delta", "gem", or `Tidal(...)`,
        `Delta(...)`, `Gem(...)`. `prefix_cache` is a size for KV snapshots of earlier prompts. `repack`
        runs matmuls with lowtide's kernels, from a repacked copy of the weights in the cache folder.
        `speculate` is "ngram", "trigram", "auto" or a draft model.
        `gpu_layers`, a number or "auto", go to GPUs, each of which gives `gpu_memory`. `provider` runs an
        ONNX model ("cuda"). `profiler` is told where time and bytes go. Raises `OverBudget` before anything
        is loaded where it cannot fit, `ModelError` for an unusable model, `NoGpu` where there is none,
        `BadOption` for wrong values.
        """
        options = LoadConfig(
            memory=memory,
            context=context,
            kv_type=kv_type,
            batch_size=batch_size,
            threads=threads,
            attention=attention,
            prefix_cache=prefix_cache,
            repack=repack,
            gpu_layers=gpu_layers,
            gpu_memory=gpu_memory,
            speculate=speculate,
            provider=provider,
            offline=offline,
            profiled=profiler is not None,
        )
        with (profiler or SILENT).span("plan"):
            planned = (
                plan_model(model, options)
                if isinstance(model, Model)
                else plan_reference(model, options)
            )
        return cls.load(planned, profiler)

    @classmethod
    def load(cls, planned: ResolvedModel, profiler: Profiler | None = None) -> Runtime:
        """Reserve the plan's lines and load the model."""
        profiler = profiler or SILENT
        return cls(Engine(planned, profiler), profiler)

    @property
    def ledger(self) -> Ledger:
        """The bytes that the model's owners hold."""
        return self._loaded.ledger

    @property
    def plan(self) -> MemoryPlan:
        """Who may hold which bytes; prints as a table."""
        return self.planned.plan

    @property
    def spec(self) -> ModelSpec:
        """The model's shape and size."""
        return self.planned.spec

    @property
    def planned(self) -> ResolvedModel:
        """The plan with the model and the machine it was made for."""
        return self._loaded.planned

    @property
    def session(self) -> SavedChats:
        """The conversation on disk, KV state included: `save(path, messages)` and `load(path)`."""
        return self._store

    def retained_spans(self) -> list[RetainedSpan]:
        """Return what `gem` kept of the last prompt that it filtered; nothing where it filtered none."""
        return self._loaded.prompt_filter.passages() if self._loaded.prompt_filter else []

    def chat(
        self,
        messages: Sequence[Message],
        options: SamplingParams | None = None,
        **named: Any,
    ) -> Generator[GenerationChunk, None, None]:
        """Answer a conversation, piece by piece; `options`, or `named` as in `SamplingParams`.

        `messages` are dicts with "role" and "content". What the KV cache holds of an earlier call is
        used again. Raises `PromptTooLong` before anything is computed; closing the iterator stops the
        answer and leaves the runtime usable.
        """
        asked_at = time.perf_counter()
        chosen = SamplingParams.of(options, **named)
        self._loaded.check(chosen)
        answer = self._begin()
        with self._profiler.span("template"):
            conversation = self._chatting()

        def prepared(some: Sequence[Message]) -> ChatPrompt:
            with self._profiler.span("template"):
                text = conversation.render(some)
            self._check_text(text)
            with self._profiler.span("tokenise"):
                token_ids = conversation.prompt_ids(text, some)
            return ChatPrompt(text=text, token_ids=token_ids, num_messages=len(some))

        chat_prompt, dropped = fit_messages(messages, prepared, self._loaded.most_tokens(), chosen)
        prompt = Prompt(
            token_ids=chat_prompt.token_ids,
            asked_at=asked_at,
            dropped_tokens=dropped.num_tokens,
            dropped_messages=dropped.num_messages,
        )
        return self._remembered(answer, prompt, chosen, chat_prompt)

    def stream(
        self, prompt: str, options: SamplingParams | None = None, **named: Any
    ) -> Generator[GenerationChunk, None, None]:
        """Continue `prompt` as it stands, without a chat template, piece by piece."""
        asked_at = time.perf_counter()
        chosen = SamplingParams.of(options, **named)
        self._loaded.check(chosen, is_completion=True)
        answer = self._begin()
        self._check_text(prompt)
        with self._profiler.span("tokenise"):
            token_ids = self._model.tokenizer.encode(prompt, add_special=True, parse_special=False)
        if not token_ids:
            raise BadOption("the prompt is empty, and this model adds no token: write one")
        kept, dropped = fit_tokens(token_ids, self._loaded.most_tokens(), chosen)
        fitted = Prompt(token_ids=kept, asked_at=asked_at, dropped_tokens=dropped)
        return self._pieces(answer, fitted, chosen)

    def generate(
        self, prompt: str, options: SamplingParams | None = None, **named: Any
    ) -> GenerationResult:
        """Continue `prompt` and return the whole result; options as for `chat`."""
        return GenerationResult.of(self.stream(prompt, options, **named))

    def trim(self, level: str = "background") -> int:
        """Give memory back, as a mobile system asks for it; return by how many bytes the resident set fell.

        "background" gives back what nobody uses, "moderate" also the prefix cache and garbage; "complete"
        also forgets the KV cache and lets go of mapped weights, which are read again with the next prompt,
        and ends an answer that is still being read. Answers stay the same. From another thread it waits
        for the pass in work. Raises `BadOption` for a level that is none.
        """
        with self._stepping:
            if level == "complete":
                self._begin()  # the one before cannot go on
            self._check_goes_on(self._answer)
            return self._loaded.trim(level).freed_bytes

    def _begin(self) -> int:
        self._end_batch()
        with self._lock:
            self._require_open()
            self._answer += 1
            return self._answer

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeUnusable("the runtime is closed: open it again")

    def _chatting(self) -> ChatEncoder:
        if self._conversation is None:
            tokenizer = self._model.tokenizer
            template = ChatTemplate(self.spec.chat_template, tokenizer.special_texts)
            self._conversation = ChatEncoder(template, tokenizer, self._last)
        return self._conversation

    def _check_text(self, text: str) -> None:
        """Refuse a text that would pass its row while it is tokenised; set aside a cache in its way."""
        num_bytes = len(text.encode("utf-8", errors="replace"))
        if num_bytes > prompt_limit_bytes(self.plan.kv_tokens):
            raise PromptTooLong(
                num_bytes // 4, self._model.context, estimated=True, droppable=False
            )
        if not self._loaded.has_room_to_tokenise(num_bytes, len(self._session.token_ids)):
            self._session.evict()

    def _pieces(
        self, answer: int, prompt: Prompt, options: SamplingParams
    ) -> Generator[GenerationChunk, None, None]:
        facts = self._loaded.generation_context()
        pieces = generate(self._model, self._session, prompt, options, facts, self._profiler)
        while True:
            with self._stepping:
                self._check_goes_on(answer)
                piece = next(pieces, None)
            if piece is None:
                return
            if options.explain and piece.finish_reason is not None:
                piece = replace(piece, kept=tuple(self.retained_spans()))
            yield piece

    def _check_goes_on(self, answer: int) -> None:
        self._require_open()
        if answer != self._answer:
            raise RuntimeUnusable("another answer or a complete trim was asked for and ended this")

    def _remembered(
        self, answer: int, prompt: Prompt, options: SamplingParams, chat_prompt: ChatPrompt
    ) -> Generator[GenerationChunk, None, None]:
        """Yield the answer and remember it for the next turn, unless another was started meanwhile."""
        token_ids: list[int] = []
        try:
            for piece in self._pieces(answer, prompt, options):
                if piece.token_id is not None:
                    token_ids.append(piece.token_id)
                yield piece
        finally:
            if answer == self._answer:
                self._chatting().answered(chat_prompt, token_ids)

    def close(self) -> None:
        """Free the model; an answer that is still being read ends with an error."""
        self._end_batch()
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loaded.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
