"""PlanLines: the lines of a plan, one method per component, for one candidate of the planner.

This is the second of the three files behind a number in `lowtide plan` (cli/plan.py, here,
memory/plan/estimates.py): a method of this class sums the terms of its component, and each term is one
formula of `estimates`. The planner calls `of` for every candidate that it considers.
"""

from __future__ import annotations

from lowtide.memory.plan import estimates
from lowtide.memory.plan import line as components
from lowtide.memory.plan.batch import (
    MAX_DRAFTED,
    BatchPlan,
    held_sequences,
    plan_batch,
    standing_tokens,
)
from lowtide.memory.plan.estimates import ContextSizes
from lowtide.memory.plan.gpu import GpuLayers, GpuPlan
from lowtide.memory.plan.line import PlanCandidate, PlanLine
from lowtide.memory.plan.plan import PlanRequest, ProcessBaseline
from lowtide.memory.plan.speculation.allocator import SpeculationChoice
from lowtide.memory.plan.speculation.choices import branch_bytes
from lowtide.models.spec import ModelSpec


class PlanLines:
    """Computes the lines of one model for the planner's candidates."""

    def __init__(
        self, spec: ModelSpec, options: PlanRequest, baseline: ProcessBaseline, sizes: ContextSizes
    ) -> None:
        self._spec = spec
        self._options = options
        self._baseline = baseline
        self._sizes = sizes
        self._gpu_layers = GpuLayers(spec, options.gpu) if options.gpu else None
        self._gpus: dict[PlanCandidate, tuple[GpuPlan, ...]] = {}

    def gpus(self, candidate: PlanCandidate) -> tuple[GpuPlan, ...]:
        """Return the plan of each GPU that takes layers."""
        if self._gpu_layers is None:
            return ()
        if candidate not in self._gpus:
            self._gpus[candidate] = self._gpu_layers.place(candidate)
        return self._gpus[candidate]

    def more_gpu_layers(self, candidate: PlanCandidate) -> dict[str, int]:
        """Return how many more layers another GiB on each GPU would take."""
        return self._gpu_layers.more_layers(candidate) if self._gpu_layers is not None else {}

    def total_bytes(self, candidate: PlanCandidate) -> int:
        """Return the planned peak."""
        return sum(row.num_bytes for row in self.of(candidate))

    def of(self, candidate: PlanCandidate) -> tuple[PlanLine, ...]:
        """Return one line per component, with 0 bytes for a component that needs nothing."""
        spec, options = self._spec, self._options
        running = (
            self._cache(candidate),
            PlanLine(
                components.COMPUTE,
                self._sizes.compute_bytes(
                    candidate.context, candidate.batch_size, candidate.kv_type
                )
                + self._shared_bytes(candidate, components.COMPUTE, components.RESERVE),
                f"batches of {candidate.batch_size} tokens",
            ),
            self._attention(candidate),
            PlanLine(components.SAMPLING, estimates.logits_bytes(spec), "logits of one token"),
            self._prompt(candidate),
        )
        weights, follows = self._weights(candidate), sum(row.num_bytes for row in running)
        loading = max(
            estimates.loading_bytes(spec, self._baseline.header_loading_bytes),
            self._baseline.vocabulary_loading_bytes - weights.num_bytes,
            self._template_bytes(),
            estimates.REPACKING_BYTES if self._repacks_in_memory(candidate) else 0,
        )
        loading -= follows
        if self._gpu_layers is not None and self.gpus(candidate):
            loading += self._gpu_layers.loading_bytes
        return (
            PlanLine(
                components.INTERPRETER,
                self._baseline.interpreter_bytes,
                f"Python, numpy, {spec.engine}",
            ),
            self._vocabulary(),
            weights,
            *running,
            *self._driver(candidate),
            *self._filter_prefill(candidate),
            *self._prefixes(candidate),
            *self._speculation(candidate),
            *self._batch(candidate),
            *_structured(spec, options.structured),
            *_rules(spec, options.rules_bytes),
            *_server(options.server_bytes),
            *_comparison(spec, options.compared_tokens),
            *_profiler(spec, options.profiled),
            PlanLine(
                components.LOADING, max(loading, 0), "temporary, beyond the memory used later"
            ),
            self._reserve(candidate),
        )

    def memory_map(self, candidate: PlanCandidate) -> bool:
        """Whether the weights are memory-mapped.

        They are not if llama.cpp repacks them, or if it copies them to a GPU.
        """
        may_be = self._baseline.repacks and not self._is_repacked(candidate)
        repacked = may_be and estimates.is_repacked(self._spec, self._baseline.processor)
        return candidate.resident_layers is not None or not (repacked or self.gpus(candidate))

    def _is_repacked(self, candidate: PlanCandidate) -> bool:
        """Whether the weights are in tiles for lowtide's matmuls."""
        return self._options.repacked or (candidate.own_kernels and self._options.optional_repack)

    def _attention_threads(self, candidate: PlanCandidate) -> int:
        """Return the threads of lowtide's attention; 0 if the engine's own runs."""
        is_optional = candidate.own_kernels and self._options.optional_attention
        return self._options.threads if is_optional else self._options.attention_threads

    def _repacks_in_memory(self, candidate: PlanCandidate) -> bool:
        """Whether weights are repacked while they are loaded, for want of a copy. Streamed ones are not."""
        asked = self._is_repacked(candidate) and self._spec.no_copy_reason is not None
        return asked and candidate.resident_layers is None

    def _driver(self, candidate: PlanCandidate) -> tuple[PlanLine, ...]:
        """What drivers of GPUs take in the process, where layers are on one."""
        gpus = self.gpus(candidate)
        if self._gpu_layers is None or not gpus:
            return ()
        return (self._gpu_layers.driver_line(gpus),)

    def _vocabulary(self) -> PlanLine:
        measured = self._baseline.vocabulary_bytes
        num_bytes = estimates.described_bytes(self._spec) if measured is None else measured
        num_tokens = self._spec.vocabulary.num_tokens
        return PlanLine(components.VOCABULARY, num_bytes, f"{num_tokens:,} tokens")

    def _weights(self, candidate: PlanCandidate) -> PlanLine:
        spec = self._spec
        if candidate.resident_layers is not None:
            return PlanLine(
                components.WEIGHTS,
                estimates.streamed_weight_bytes(
                    spec, candidate.resident_layers, candidate.batch_size, self._options.threads
                ),
                f"{spec.quantisation}, {candidate.resident_layers} of {spec.num_layers} layers resident, the "
                "others streamed from the file",
            )
        gpus = self.gpus(candidate)
        if self._gpu_layers is not None and gpus:
            left = self._gpu_layers.weight_bytes_left(gpus)
            names = " and ".join(gpu.device.name for gpu in gpus)
            return PlanLine(
                components.WEIGHTS,
                left + self._shared_bytes(candidate, components.WEIGHTS),
                f"{spec.quantisation}, layers that are not on {names}",
            )
        memory_map = self.memory_map(candidate)
        return PlanLine(
            components.WEIGHTS,
            estimates.weight_bytes(spec, memory_map=memory_map),
            f"{spec.quantisation}, {self._layout(candidate)}"
            + (", with a second copy in another layout" if spec.copied_bytes else ""),
        )

    def _layout(self, candidate: PlanCandidate) -> str:
        """Say where resident weights lie, and in whose layout."""
        if self._repacks_in_memory(candidate):
            return f"repacked for lowtide in memory, because {self._spec.no_copy_reason}"
        if not self.memory_map(candidate):
            return "copied and repacked by llama.cpp"
        return f"{'repacked for lowtide, ' if self._is_repacked(candidate) else ''}memory-mapped"

    def _cache(self, candidate: PlanCandidate) -> PlanLine:
        tokens, num_tokens = f"{candidate.context:,} tokens", self.cache_tokens(candidate)
        if num_tokens < candidate.context:
            tokens = f"{num_tokens:,} of {candidate.context:,} tokens"
        elsewhere = sum(
            gpu.cache_bytes for gpu in self.gpus(candidate) if not gpu.device.shares_memory
        )
        num_bytes = self._sizes.kv_bytes(num_tokens, candidate.kv_type) - elsewhere
        why = f"{tokens} of {candidate.kv_type}"
        if elsewhere:
            why += ", layers in RAM" if num_bytes > 0 else ", all on a GPU"
        return PlanLine(components.CACHE, max(num_bytes, 0), why)

    def _reserve(self, candidate: PlanCandidate) -> PlanLine:
        """What no other line counts: lists that grow with the context and the layers, small otherwise."""
        slots = self._sizes.slot_bytes(candidate.context, self.cache_tokens(candidate))
        lists = slots + estimates.graph_bytes(self._spec)
        num_bytes = max(estimates.RESERVE_BYTES, estimates.SLACK_BYTES + lists)
        return PlanLine(components.RESERVE, num_bytes, "allocator slack, KV slots, graph")

    def _template_bytes(self) -> int:
        measured = self._baseline.template_bytes
        return estimates.template_bytes(self._spec) if measured is None else measured

    def cache_tokens(self, candidate: PlanCandidate) -> int:
        """Return how many tokens the KV cache's line covers: with a filter, only the retained ones."""
        prefill = self._options.filter_prefill
        if not self._baseline.kv_on_demand:
            return candidate.kv_tokens
        if (
            self._options.sequences > 1
        ):  # answers run in the batch's cache, and this one grows where it is used
            return min(candidate.kv_tokens, estimates.KV_PADDING)
        if prefill is None:
            return candidate.kv_tokens
        return prefill.cache_tokens(candidate.kv_tokens)

    def _filter_prefill(self, candidate: PlanCandidate) -> tuple[PlanLine, ...]:
        """The filter's own context. If it is not cached, it uses memory that the KV cache does not need yet."""
        prefill, spec = self._options.filter_prefill, self._spec
        if prefill is None:
            return ()
        if self._baseline.kv_on_demand:
            cache_bytes = estimates.filter_layers_bytes(
                spec, prefill.num_layers, candidate.kv_tokens, candidate.kv_type
            )
            if not candidate.cache_filter_pass:
                cache_bytes = max(cache_bytes - self._cache(candidate).num_bytes, 0)
        else:
            cache_bytes = self._sizes.kv_bytes(candidate.context, candidate.kv_type)
        beside = self._sizes.filter_context_bytes(
            candidate.context, candidate.batch_size, candidate.kv_type
        )
        cached = "" if candidate.cache_filter_pass else ", not cached"
        why = f"{prefill.num_layers} of {spec.num_layers} layers, {candidate.kv_tokens:,} tokens{cached}"
        return (PlanLine(components.FILTER_PREFILL, cache_bytes + beside, why),)

    def _shared_bytes(self, candidate: PlanCandidate, *of: str) -> int:
        """Return the bytes of these components that GPUs hold in the machine's own memory."""
        shared = (gpu for gpu in self.gpus(candidate) if gpu.device.shares_memory)
        return sum(row.num_bytes for gpu in shared for row in gpu.rows if row.component in of)

    def _prompt(self, candidate: PlanCandidate) -> PlanLine:
        """A prompt is tokenised before the KV cache holds it, so it may use the cache's memory."""
        num_bytes, why = estimates.prompt_bytes(self._spec, candidate.kv_tokens), ""
        if self._baseline.kv_on_demand:
            unused = self._cache(candidate).num_bytes
            num_bytes = max(num_bytes - unused, estimates.prompt_bytes(self._spec, 0))
            why = ", partly in memory planned for the KV cache"
        limit = estimates.prompt_limit_bytes(candidate.kv_tokens)
        return PlanLine(components.PROMPT, num_bytes, f"{limit:,} bytes of text{why}")

    def _prefixes(self, candidate: PlanCandidate) -> tuple[PlanLine, ...]:
        if not self._options.prefix_bytes:
            return ()
        cells = estimates.kv_bytes(self._spec, estimates.KV_PADDING, candidate.kv_type)
        num_tokens = candidate.prefix_bytes * estimates.KV_PADDING // max(cells, 1)
        why = f"KV of earlier prompts, up to {num_tokens:,} tokens"
        return (PlanLine(components.PREFIXES, candidate.prefix_bytes, why),)

    def _speculation(self, candidate: PlanCandidate) -> tuple[PlanLine, ...]:
        config = self._options.speculation
        if config is None:
            return ()
        choice, kv_tokens = candidate.speculation, candidate.kv_tokens
        num_bytes = config.num_bytes(self._spec, choice, kv_tokens, candidate.kv_type)
        row = PlanLine(components.SPECULATION, num_bytes, _speculation_line(choice))
        return (row, *config.draft_model_lines(choice.verify_batch, kv_tokens))

    def batch(self, candidate: PlanCandidate) -> BatchPlan | None:
        """Return the cache of answers that run together; None where one runs at a time."""
        options, choice, config = self._options, candidate.speculation, self._options.speculation
        if options.sequences == 1:
            return None
        verifies = config is not None and config.draft_model is None and choice.verify_batch > 1
        room = max(candidate.batch_size - options.sequences, 0)
        return plan_batch(
            self._spec,
            self._sizes,
            num_sequences=options.sequences,
            num_held=held_sequences(options.sequences, candidate.batch_size),
            own_tokens=standing_tokens(options.sequences, candidate.kv_tokens),
            batch_size=candidate.batch_size,
            kv_type=candidate.kv_type,
            context=candidate.context,
            attention_threads=self._attention_threads(candidate),
            max_drafted=min(room, MAX_DRAFTED) if verifies else 0,
            speculation=config,
            drafts=choice.drafts,
        )

    def _batch(self, candidate: PlanCandidate) -> tuple[PlanLine, ...]:
        batch = self.batch(candidate)
        if batch is None:
            return ()
        why = f"{batch.num_sequences} answers together, {batch.num_kv_tokens:,} tokens of {candidate.kv_type} for all"
        return (PlanLine(components.BATCH, batch.num_bytes, why),)

    def _attention(self, candidate: PlanCandidate) -> PlanLine:
        """The scratch of lowtide's kernels: dense attention, matmuls, and what the policy adds."""
        spec, options = self._spec, self._options
        threads, repacked = self._attention_threads(candidate), self._is_repacked(candidate)
        num_bytes = options.attention.scratch_bytes(spec, candidate.context, threads)
        if threads:
            num_bytes += estimates.attention_bytes(spec, candidate.context, threads)
            cells = estimates.padded_context(candidate.context)
            choice = candidate.speculation
            num_bytes += branch_bytes(choice.verify_batch, cells) * choice.branches
            if choice.branches:
                num_bytes += estimates.shared_keys_bytes(spec, cells, choice.verify_batch)
        if repacked:
            num_bytes += estimates.matmul_scratch_bytes(spec, candidate.batch_size)
            num_bytes += estimates.helper_bytes(spec, candidate.batch_size, options.threads)
        why = f"not needed by {spec.engine}'s kernels"
        if threads or repacked:
            num_threads = threads or options.threads
            parts = ["attention"] * bool(threads) + ["matmuls"] * repacked
            why = f"lowtide's {' and '.join(parts)}, {num_threads} thread{'s' * (num_threads > 1)}"
            why += f", {options.attention.description}" if options.attention.description else ""
        return PlanLine(components.SCRATCH, num_bytes, why)


def _speculation_line(choice: SpeculationChoice) -> str:
    if choice.verify_batch < 2:
        return "watches drafts, verifies none" if choice.verify_batch else "off"
    trees = ", with branches" if choice.branches else ""
    return f"{choice.name}: verifies {choice.verify_batch} tokens at once{trees}"


def _structured(spec: ModelSpec, is_asked: bool) -> tuple[PlanLine, ...]:
    if not is_asked:
        return ()
    num_tokens = spec.vocabulary.num_tokens
    why = f"the bytes of {num_tokens:,} tokens as a trie, and one grammar"
    return (PlanLine(components.STRUCTURED, estimates.structured_bytes(spec.vocabulary), why),)


def _rules(spec: ModelSpec, num_bytes: int) -> tuple[PlanLine, ...]:
    if not num_bytes:
        return ()
    why = f"tables of {num_bytes:,} bytes, the order of all tokens, and masks"
    return (PlanLine(components.RULES, estimates.rules_bytes(spec.vocabulary, num_bytes), why),)


def _server(num_bytes: int) -> tuple[PlanLine, ...]:
    if not num_bytes:
        return ()
    return (PlanLine(components.SERVER, num_bytes, "connections, bodies, answers on their way"),)


def _comparison(spec: ModelSpec, num_tokens: int) -> tuple[PlanLine, ...]:
    if not num_tokens:
        return ()
    num_bytes = estimates.comparison_bytes(spec, num_tokens)
    return (PlanLine(components.COMPARISON, num_bytes, f"{num_tokens} next-token distributions"),)


def _profiler(spec: ModelSpec, profiled: bool) -> tuple[PlanLine, ...]:
    if not profiled:
        return ()
    num_bytes = estimates.profiler_bytes(spec.num_layers)
    return (PlanLine(components.PROFILER, num_bytes, "spans, samples and layer times"),)
