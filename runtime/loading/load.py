"""Engine: a planned model in memory, with its attention, prompt filter and speculator.

It reserves the plan's lines in the ledger, loads through the backend, and knows how memory is released again.
"""

from __future__ import annotations

import gc
from collections.abc import Hashable
from contextlib import AbstractContextManager
from dataclasses import replace

from lowtide.attention.bindings.counts import KernelCounts
from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.attention.bindings.policy import AttentionKernels
from lowtide.attention.policy import PassController
from lowtide.memory.budget import Ledger
from lowtide.memory.os.pages import trim_heap
from lowtide.memory.plan.estimates import (
    filter_layers_bytes,
    kv_bytes,
    prompt_limit_bytes,
    rules_bytes,
    structured_bytes,
    tokenising_bytes,
)
from lowtide.memory.plan.kv_reservation import KVReservation
from lowtide.memory.plan.line import CACHE, FILTER_PREFILL, PREFIXES, PROMPT, RULES, STRUCTURED
from lowtide.memory.process import read_process_memory
from lowtide.memory.reclaim import Reclaimed, Reclaimer, reclaim
from lowtide.memory.units import OverBudget, format_bytes
from lowtide.models.arguments.names import option
from lowtide.models.errors import BadOption, LowtideError
from lowtide.models.gguf.embedding import GgufEmbedder
from lowtide.models.gguf.parameters import LoadOptions
from lowtide.models.model import Model
from lowtide.models.text.tokenizer import MAX_STACK_BYTES_PER_CHARACTER, longest_stretch
from lowtide.runtime.backends.backend import LoadedModel, Progress, ResolvedModel
from lowtide.runtime.errors import CannotRepack, PromptTooLong
from lowtide.runtime.generation.state import GenerationContext
from lowtide.runtime.generation.watchdog import Watchdog
from lowtide.runtime.kv.prefix_cache import PrefixCache
from lowtide.runtime.kv.prompt_filter import PromptFilter
from lowtide.runtime.kv.session import KVSession
from lowtide.runtime.loading.speculation import load_speculation
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.profiling.memory import WatchedModel
from lowtide.runtime.profiling.profiler import SILENT, Profiler
from lowtide.runtime.profiling.retention_map import RetainedSpan
from lowtide.runtime.speculation.controller import SpeculationController
from lowtide.runtime.structured.aligned.aligned import Aligned, Tries, held_bytes
from lowtide.runtime.structured.answer import ConstrainedAnswer
from lowtide.runtime.structured.vocabulary import TokenVocabulary


class Engine:
    """A loaded model inside its plan.

    `controller` prepares each forward pass, `kv_reservation` reserves the bytes of its tokens. `reclaimers` release
    memory, in order; the heap is trimmed last, for what the others free. Raises `OverBudget` before anything
    is loaded where the plan does not fit, and after loading where the process exceeds it all the same. `progress` is
    called with the bytes of a repacked copy as they are written.
    """

    def __init__(
        self,
        planned: ResolvedModel,
        profiler: Profiler = SILENT,
        progress: Progress = lambda _: None,
    ) -> None:
        planned.require_fit()
        self._profiler = profiler
        repacked, self.not_repacked_reason = _repacked(planned, profiler, progress)
        try:
            self._load(repacked)
        except (
            CannotRepack
        ) as reason:  # its graph reads repacked weights in another way than others
            self.not_repacked_reason = str(reason)
            self._load(_without_repack(planned))

    def _load(self, planned: ResolvedModel) -> None:
        """Reserve the lines of the plan, load the model, and complete it."""
        self.planned = planned
        self.ledger = Ledger(planned.plan.budget.num_bytes)
        for line in planned.plan.rows:
            self.ledger.reserve(line.component, line.num_bytes)
        self.prefixes = PrefixCache(self.ledger.components.get(PREFIXES, 0))
        self.speculation: SpeculationController | None = None
        self.prompt_filter: PromptFilter | None = None
        self._loaded: LoadedModel | None = None
        self._profiler.watch(planned.spec, planned.plan, self._watched())
        self._loaded = planned.backend.load(planned, self._profiler)
        try:
            self._complete()
        except BaseException:
            self.close()
            raise

    def _complete(self) -> None:
        """Make what works on the loaded model, and check the result."""
        planned, model, kernels = self.planned, self.model, self.attention_kernels
        self._profiler.count_tokens(lambda: model.num_tokens)
        self.reclaimers = [
            Reclaimer("moderate", self.prefixes.clear),
            *self._loaded_model.reclaimers,
            Reclaimer("background", model.release_pages),
        ]
        self._vocabulary = TokenVocabulary(model.tokenizer, planned.spec.vocabulary.num_tokens)
        self._tries = Tries()
        self.controller = (
            PassController() if kernels is None else planned.policy.configure(kernels, planned.spec)
        )
        self.kv_reservation = KVReservation(
            self.ledger, planned.plan.cache_tokens, self._reserved_kv_bytes
        )
        self.prompt_filter = self._make_prompt_filter()
        if planned.plan.resident_layers is not None or planned.spec.repacked_tensors:
            self._try_passes()
        self.speculation = load_speculation(planned, model, self.controller, self.ledger)
        self.reclaimers += (Reclaimer("moderate", gc.collect), Reclaimer("background", trim_heap))
        self._check_resident()

    @property
    def _loaded_model(self) -> LoadedModel:
        assert self._loaded is not None, "the model is not loaded yet"
        return self._loaded

    @property
    def model(self) -> Model:
        """The loaded model."""
        return self._loaded_model.model

    @property
    def attention_kernels(self) -> AttentionKernels | None:
        """Lowtide's attention kernels; None if the engine's own run."""
        return self._loaded.kernels if self._loaded is not None else None

    @property
    def hook(self) -> LlamaHook | None:
        """The same kernels if they run in llama.cpp's graph."""
        return self._loaded_model.hook

    def _make_prompt_filter(self) -> PromptFilter | None:
        """Make what shortens prompts, if the policy filters them."""
        plan, policy = self.planned.plan, self.planned.policy
        scorer, selector = self.attention_kernels, policy.prompt_selector
        first = policy.memory.filter_prefill
        if scorer is None or selector is None or first is None:
            return None
        context = self._loaded_model.load_filter_context(first)
        planned_bytes = self.ledger.components[FILTER_PREFILL]

        def bytes_of(num_tokens: int) -> int:
            more = self._filter_layers_bytes(num_tokens) - self._filter_layers_bytes(plan.kv_tokens)
            return planned_bytes + max(more, 0)

        reservation = KVReservation(self.ledger, plan.kv_tokens, bytes_of, component=FILTER_PREFILL)
        made = PromptFilter(
            context, scorer, selector, reservation, caches_prompt=plan.cache_filter_pass
        )
        self.reclaimers.insert(0, Reclaimer("moderate", made.clear))
        self.reclaimers.append(Reclaimer("background", context.release_pages))
        return made

    def most_tokens(self) -> int:
        """Return how many tokens a prompt may have now: the context, or what the budget allows."""
        most = self.kv_reservation.most_tokens(self.model.context)
        return max(most, self.prompt_filter.most_tokens()) if self.prompt_filter else most

    def embedder(self, options: LoadOptions) -> AbstractContextManager[GgufEmbedder]:
        """Make a context that embeds with the weights, for a block; raise `UnsupportedModel` where it cannot."""
        return self._loaded_model.embedder(options)

    def new_session(self) -> KVSession:
        """Return the session of the model's one KV cache."""
        return KVSession(
            self.model,
            self.controller,
            self.kv_reservation,
            self._profiler,
            prefixes=self.prefixes,
            prompt_filter=self.prompt_filter,
        )

    def constrained_answer(self, params: SamplingParams) -> ConstrainedAnswer | None:
        """Return what the answer must look like, at its start; None where nothing is asked for.

        Raises `BadOption` where the constraint cannot be enforced, and `OverBudget` where it has no room.
        """
        if params.constraint is None:
            return None
        vocabulary, held = self.planned.spec.vocabulary, self.ledger.components
        if params.constraint.needs_grammar:
            needed = structured_bytes(vocabulary, params.constraint.grammar_bytes)
            self.ledger.reserve(STRUCTURED, max(needed, held.get(STRUCTURED, 0)))
        num_bytes = rules_bytes(
            vocabulary, held_bytes(params.constraint.num_bytes, params.sampling)
        )
        if num_bytes > held.get(RULES, 0):
            self.ledger.reserve(RULES, num_bytes)
        constraint = params.constraint.compile(self._vocabulary)
        end_ids, context = self._vocabulary.end_ids, self.model.context
        if params.sampling != "masked":
            key = (_hashable(params.constraint), params.temperature, params.max_tokens)
            constraint = Aligned(
                constraint,
                self._tries,
                key,
                end_ids,
                params.temperature,
                asks_mask=params.sampling == "asap",
            )
        return ConstrainedAnswer(constraint, end_ids, params.max_tokens, context)

    @property
    def vocabulary(self) -> TokenVocabulary:
        """The bytes of all tokens, which constraints share."""
        return self._vocabulary

    def generation_context(self) -> GenerationContext:
        """Return what the statistics of a generation say about the model and its plan."""
        plan = self.planned.plan
        return GenerationContext(
            budget_bytes=plan.budget.num_bytes,
            planned_bytes=plan.total_bytes,
            attention=self.planned.attention_in_words,
            kernels=self.planned.kernels,
            repacked_tensors=len(self.planned.spec.repacked_tensors),
            not_repacked_reason=self.not_repacked_reason,
            kernel_counts=self.kernel_counts,
            watchdog=Watchdog(plan.budget.num_bytes, self.trim),
            speculation=self.speculation,
            threads=self.num_threads,
            max_tokens=self.model.context,
            retained_spans=self.retained_spans,
        )

    def retained_spans(self) -> list[RetainedSpan]:
        """Return the spans that `gem` retained of the last prompt that it filtered, in order."""
        return self.prompt_filter.retained_spans() if self.prompt_filter else []

    def num_threads(self) -> int | None:
        """Return how many threads computed the last pass; None where that is unknown."""
        threads = self._loaded_model.threads
        return None if threads is None else threads.current.count

    def trim(self, level: str) -> Reclaimed:
        """Release the memory that `level` allows, not during a pass; raise `BadOption` for another level."""
        return reclaim(self.reclaimers, level)

    def _try_passes(self) -> None:
        """Read the weights once, so that an unsupported graph fails now and not in the first answer.

        Raises `CannotRepack` where that is due to weights that are repacked by default.
        """
        try:
            self._pass_both_sizes()
        except LowtideError as error:
            if self.planned.request.optional_repack and self.planned.spec.repacked_tensors:
                raise CannotRepack(str(error)) from error
            raise

    def _pass_both_sizes(self) -> None:
        self.controller.begin_prefill()
        for num_tokens in {1, min(2, self.planned.plan.batch_size)}:
            self.model.forward((0,) * num_tokens)
            self.model.truncate(0)
        self._loaded_model.check_graph()

    def _kv_bytes(self, num_tokens: int) -> int:
        return kv_bytes(self.planned.spec, num_tokens, self.planned.plan.kv_type)

    def _reserved_kv_bytes(self, num_tokens: int) -> int:
        """Return what the KV cache takes, and the engine's list of slots where it is longer than planned."""
        more = max(num_tokens - self.planned.plan.cache_tokens, 0)
        return self._kv_bytes(num_tokens) + self.planned.sizes.slot_bytes(0, more)

    def _filter_layers_bytes(self, num_tokens: int) -> int:
        first = self.planned.policy.memory.filter_prefill
        num_layers = first.num_layers if first else 0
        return filter_layers_bytes(
            self.planned.spec, num_layers, num_tokens, self.planned.plan.kv_type
        )

    def check(self, options: SamplingParams, *, is_completion: bool = False) -> None:
        """Raise `BadOption` where the policy cannot do what is requested."""
        policy = self.planned.policy
        if is_completion and policy.completion_refusal is not None:
            raise BadOption(policy.completion_refusal)
        size = self.planned.spec.vocabulary.num_tokens
        beyond = [token_id for token_id, _ in options.logit_bias if token_id >= size]
        if beyond:
            raise BadOption(
                f"{option('logit_bias')} has token {beyond[-1]}, but the model's tokens are 0 to {size - 1}: name one "
                "of those"
            )
        if options.explain and self.prompt_filter is None:
            raise BadOption(
                f"explain shows which tokens of a prompt gem retained, but attention is {policy.name!r}: open "
                "with attention='gem', or leave explain out"
            )

    def kernel_counts(self) -> KernelCounts | None:
        """Return what lowtide's attention kernels have done; None where the engine's own run."""
        kernels = self.attention_kernels
        return kernels.counts() if kernels is not None else None

    def check_text(self, text: str) -> None:
        """Refuse a text that is too long, or takes more memory to tokenise than is planned for it."""
        self.check_text_length(text)
        self.require_room_to_tokenise(text)

    def check_text_length(self, text: str) -> None:
        """Raise `PromptTooLong` for a text that cannot fit the context, whatever its tokens are."""
        num_bytes = len(text.encode("utf-8", errors="replace"))
        if num_bytes > prompt_limit_bytes(self.planned.plan.kv_tokens):
            raise PromptTooLong(num_bytes // 4, self.model.context, estimated=True, droppable=False)

    def has_room_to_tokenise(self, text: str, num_tokens: int) -> bool:
        """Whether a text can be tokenised while the KV cache holds `num_tokens`.

        Most vocabularies take next to no stack. Which ones do is measured only where the worst would not fit.
        """
        text_bytes = len(text.encode("utf-8", errors="replace"))
        room = self.idle_bytes(num_tokens) - tokenising_bytes(self.planned.spec, text_bytes)
        if room < 0 or MAX_STACK_BYTES_PER_CHARACTER * len(text) <= room:
            return room >= 0
        return self.model.tokenizer.stack_bytes(text) <= room

    def require_room_to_tokenise(self, text: str) -> None:
        """Raise `BadOption` for a text that takes more memory to tokenise than is planned."""
        if not self.has_room_to_tokenise(text, 0):
            raise BadOption(
                f"the text has a run of {longest_stretch(text):,} characters that tokenising takes "
                f"{format_bytes(self.model.tokenizer.stack_bytes(text))} of stack for, more than is planned: put "
                f"blanks or new lines into it, or raise {option('memory')} and {option('context')}"
            )

    def idle_bytes(self, num_tokens: int) -> int:
        """Return how much of the plan is unused between prompts, while the KV cache holds `num_tokens`.

        That is the line for tokenising and the part of the KV cache without tokens.
        """
        reserved = self.ledger.components
        idle = reserved[PROMPT]
        if self.planned.baseline.kv_on_demand:
            idle += max(reserved[CACHE] - self._kv_bytes(num_tokens), 0)
        return idle

    def _watched(self) -> WatchedModel:
        """Return what a profiler may ask about the model, while it is loaded and later."""
        spec, plan = self.planned.spec, self.planned.plan
        return WatchedModel(
            paths=spec.paths,
            file_bytes=spec.file_bytes,
            memory_map=plan.memory_map,
            cache_bytes=kv_bytes(spec, plan.context, plan.kv_type) - plan.gpu_cache_bytes,
            scratch_bytes=lambda: getattr(self.kernel_counts(), "scratch_bytes", 0),
            prefix_bytes=lambda: self.prefixes.num_bytes,
        )

    def _check_resident(self) -> None:
        """Compare the plan with the process: its formulas are not measured for every architecture.

        KV slots are planned but not resident yet, so they are added.
        """
        plan, baseline = self.planned.plan, self.planned.baseline
        ahead = self.ledger.components[CACHE] if baseline.kv_on_demand else 0
        if baseline.kv_on_demand and self.prompt_filter is not None:
            first = self._filter_layers_bytes(plan.kv_tokens)
            # A filter pass that is not cached lies where the KV cache is empty meanwhile.
            ahead = ahead + first if plan.cache_filter_pass else max(ahead, first)
        memory = read_process_memory()
        needed = max(memory.peak_bytes, memory.resident_bytes + ahead)
        if needed > plan.budget.num_bytes:
            raise OverBudget(
                f"{self.planned.spec.name}, loaded,",
                needed,
                plan.budget.num_bytes,
                f"raise {option('memory')}",
            )

    def close(self) -> None:
        """Free the model; closing twice is allowed."""
        self._profiler.finish()
        self.prefixes.clear()
        if self.prompt_filter is not None:
            self.prompt_filter.close()
        if self.speculation is not None:
            self.speculation.close()
        self._loaded_model.close()
        for component in self.ledger.components:
            self.ledger.release(component)


def _repacked(
    planned: ResolvedModel, profiler: Profiler, progress: Progress
) -> tuple[ResolvedModel, str | None]:
    """Return the model with the spec of its repacked copy where that is requested, or say why there is none.

    Raises `CannotRepack` where the plan does not hold for the original weights.
    """
    if planned.options.repack is not True:
        return planned, None
    backend, reason = planned.backend, planned.spec.no_copy_reason
    if reason is not None and planned.plan.resident_layers is not None:
        return (
            _without_repack(planned),
            f"weights that are streamed are read from a file, and {reason}",
        )
    with profiler.span("repacking"):
        try:
            return replace(planned, spec=backend.repack(planned.spec, progress)), None
        except CannotRepack as error:
            if not backend.runs_without_repack:
                raise
            return _without_repack(planned), str(error)


def _without_repack(planned: ResolvedModel) -> ResolvedModel:
    return replace(planned, options=replace(planned.options, repack=False))


def _hashable(value: Hashable) -> Hashable:
    """Return the value, or its identity where a class of the caller's has no hash."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value
