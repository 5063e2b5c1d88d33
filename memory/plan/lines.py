"""The rows of a plan: what each owner needs under one choice. Makes no choice and knows no budget."""

from __future__ import annotations

from lowtide.memory.plan import estimates as footprint
from lowtide.memory.plan import line as components
from lowtide.memory.plan.estimates import ContextSizes
from lowtide.memory.plan.gpu import GpuLayers, GpuPlan
from lowtide.memory.plan.line import PlanCandidate, PlanLine
from lowtide.memory.plan.plan import PlanRequest, ProcessBaseline
from lowtide.memory.plan.speculation import branch_bytes
from lowtide.models.spec import ModelSpec


class PlanLines:
    """Makes the rows for choices of one model, host and wish."""

    def __init__(
        self, spec: ModelSpec, options: PlanRequest, baseline: ProcessBaseline, sizes: ContextSizes
    ) -> None:
        self._spec = spec
        self._options = options
        self._baseline = baseline
        self._sizes = sizes
        self._gpu_layers = GpuLayers(spec, options.gpu) if options.gpu else None
        self._gpus: dict[PlanCandidate, tuple[GpuPlan, ...]] = {}

    def gpus(self, choice: PlanCandidate) -> tuple[GpuPlan, ...]:
        """Return the plan of each device that takes layers."""
        if self._gpu_layers is None:
            return ()
        if choice not in self._gpus:
            self._gpus[choice] = self._gpu_layers.place(choice)
        return self._gpus[choice]

    def total_bytes(self, choice: PlanCandidate) -> int:
        """Return the planned peak."""
        return sum(row.num_bytes for row in self.of(choice))

    def of(self, choice: PlanCandidate) -> tuple[PlanLine, ...]:
        """Return one row an owner; every owner has one, with 0 where it needs nothing."""
        spec, options = self._spec, self._options
        running = (
            self._cache(choice),
            PlanLine(
                components.COMPUTE,
                self._sizes.compute_bytes(choice.context, choice.batch_size, choice.kv_type)
                + self._shared_bytes(choice, components.COMPUTE, components.RESERVE),
                f"{choice.batch_size} rows a pass",
            ),
            self._attention(choice),
            PlanLine(components.SAMPLING, footprint.logits_bytes(spec), "a row of the vocabulary"),
            self._prompt(choice),
        )
        weights, follows = self._weights(choice), sum(row.num_bytes for row in running)
        loading = max(
            footprint.loading_bytes(spec),
            self._baseline.vocabulary_loading_bytes - weights.num_bytes,
        )
        loading -= follows
        if self._gpu_layers is not None and self.gpus(choice):
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
            *self._first_pass(choice),
            *self._prefixes(choice),
            *self._speculation(choice),
            *_comparison(spec, options.compared_tokens),
            *_profiler(spec, options.profiled),
            PlanLine(
                components.LOADING, max(loading, 0), "needed for a moment, beyond what follows it"
            ),
            PlanLine(components.RESERVE, footprint.RESERVE_BYTES, "allocator slack"),
        )

    def memory_map(self, choice: PlanCandidate) -> bool:
        """Whether the weights are mapped from their file: not where llama.cpp packs them anew, nor where it
        only passes them on to a device.
        """
        may_be = self._baseline.repacks and not self._options.packed
        repacked = may_be and footprint.is_repacked(self._spec, self._baseline.processor)
        return choice.resident_layers is not None or not (repacked or self.gpus(choice))

    def _vocabulary(self) -> PlanLine:
        vocabulary = self._spec.vocabulary
        measured = self._baseline.vocabulary_bytes
        num_bytes = footprint.vocabulary_bytes(vocabulary) if measured is None else measured
        return PlanLine(components.VOCABULARY, num_bytes, f"{vocabulary.num_tokens:,} tokens")

    def _weights(self, choice: PlanCandidate) -> PlanLine:
        spec = self._spec
        if choice.resident_layers is not None:
            return PlanLine(
                components.WEIGHTS,
                footprint.streamed_weight_bytes(
                    spec, choice.resident_layers, choice.batch_size, self._options.threads
                ),
                f"{spec.quantisation}, {choice.resident_layers} of {spec.num_layers} layers stay, the others "
                "are read again for every pass",
            )
        gpus = self.gpus(choice)
        if self._gpu_layers is not None and gpus:
            left = self._gpu_layers.weight_bytes_left(gpus)
            names = " and ".join(gpu.device.name for gpu in gpus)
            return PlanLine(
                components.WEIGHTS,
                left + self._shared_bytes(choice, components.WEIGHTS),
                f"{spec.quantisation}, what {names} does not hold",
            )
        memory_map = self.memory_map(choice)
        return PlanLine(
            components.WEIGHTS,
            footprint.weight_bytes(spec, memory_map=memory_map),
            f"{spec.quantisation}, {'packed, ' if self._options.packed else ''}"
            f"{'memory-mapped' if memory_map else 'copied and repacked'}"
            + (", and a copy packed anew" if spec.copied_bytes else ""),
        )

    def _cache(self, choice: PlanCandidate) -> PlanLine:
        tokens, num_tokens = f"{choice.context:,} tokens", self.cache_tokens(choice)
        if num_tokens < choice.context:
            tokens = f"{num_tokens:,} of {choice.context:,} tokens"
        elsewhere = sum(
            gpu.cache_bytes for gpu in self.gpus(choice) if not gpu.device.shares_memory
        )
        num_bytes = self._sizes.kv_bytes(num_tokens, choice.kv_type) - elsewhere
        why = f"{tokens} of {choice.kv_type}"
        if elsewhere:
            why += ", of the other layers" if num_bytes > 0 else ", all of it on a device"
        return PlanLine(components.CACHE, max(num_bytes, 0), why)

    def cache_tokens(self, choice: PlanCandidate) -> int:
        """Return how many tokens the cache's row holds: of prompts that are filtered, what goes on."""
        first = self._options.filter_prefill
        if first is None or not self._baseline.kv_on_demand:
            return choice.kv_tokens
        return first.cache_tokens(choice.kv_tokens)

    def _first_pass(self, choice: PlanCandidate) -> tuple[PlanLine, ...]:
        """A context of its own. What is not kept lies where the cache is empty meanwhile."""
        first, spec = self._options.filter_prefill, self._spec
        if first is None:
            return ()
        if self._baseline.kv_on_demand:
            cache_bytes = footprint.filter_layers_bytes(
                spec, first.num_layers, choice.kv_tokens, choice.kv_type
            )
            if not choice.cache_filter_pass:
                cache_bytes = max(cache_bytes - self._cache(choice).num_bytes, 0)
        else:
            cache_bytes = self._sizes.kv_bytes(choice.context, choice.kv_type)
        beside = self._sizes.filter_context_bytes(choice.context, choice.batch_size, choice.kv_type)
        kept = "" if choice.cache_filter_pass else ", not kept"
        why = f"{first.num_layers} of {spec.num_layers} layers, {choice.kv_tokens:,} tokens{kept}"
        return (PlanLine(components.FILTER_PREFILL, cache_bytes + beside, why),)

    def _shared_bytes(self, choice: PlanCandidate, *of: str) -> int:
        """What devices hold of these owners in the machine's own memory."""
        shared = (gpu for gpu in self.gpus(choice) if gpu.device.shares_memory)
        return sum(row.num_bytes for gpu in shared for row in gpu.rows if row.component in of)

    def _prompt(self, choice: PlanCandidate) -> PlanLine:
        """A long prompt is tokenised before its cache is used: that much memory is free then."""
        num_bytes, why = footprint.prompt_bytes(self._spec, choice.kv_tokens), ""
        if self._baseline.kv_on_demand:
            unused = self._cache(choice).num_bytes
            num_bytes = max(num_bytes - unused, footprint.prompt_bytes(self._spec, 0))
            why = ", while the cache does not need its own yet"
        limit = footprint.prompt_limit_bytes(choice.kv_tokens)
        return PlanLine(components.PROMPT, num_bytes, f"{limit:,} bytes of text{why}")

    def _prefixes(self, choice: PlanCandidate) -> tuple[PlanLine, ...]:
        if not self._options.prefix_bytes:
            return ()
        cells = footprint.kv_bytes(self._spec, footprint.KV_PADDING, choice.kv_type)
        num_tokens = choice.prefix_bytes * footprint.KV_PADDING // max(cells, 1)
        why = f"states of other prompts, up to {num_tokens:,} tokens"
        return (PlanLine(components.PREFIXES, choice.prefix_bytes, why),)

    def _speculation(self, choice: PlanCandidate) -> tuple[PlanLine, ...]:
        wish = self._options.speculation
        if wish is None:
            return ()
        num_rows, kv_tokens = choice.verify_batch, choice.kv_tokens
        num_bytes = wish.num_bytes(self._spec, num_rows, kv_tokens, choice.kv_type)
        why = f"{num_rows} rows a verification" if num_rows else "given up"
        row = PlanLine(components.SPECULATION, num_bytes, why)
        return (row, *wish.draft_model_rows(num_rows, kv_tokens))

    def _attention(self, choice: PlanCandidate) -> PlanLine:
        """The scratch of lowtide's kernels: dense attention, matmuls, and what the policy adds."""
        spec, options, threads = self._spec, self._options, self._options.attention_threads
        num_bytes = options.attention.scratch_bytes(spec, choice.context, threads)
        if threads:
            num_bytes += footprint.attention_bytes(spec, choice.context, threads)
            cells = footprint.padded_context(choice.context)
            num_bytes += branch_bytes(choice.verify_batch, cells)
        if options.packed:
            num_bytes += footprint.matmul_scratch_bytes(spec, choice.batch_size)
        return PlanLine(components.SCRATCH, num_bytes, _kernels_line(options, spec.engine))


def _kernels_line(options: PlanRequest, engine: str) -> str:
    if not options.attention_threads and not options.packed:
        return f"{engine}'s kernels need none"
    threads = options.attention_threads or options.threads
    description = options.attention.description
    return f"lowtide's kernels, {threads} threads" + (f", {description}" if description else "")


def _comparison(spec: ModelSpec, num_rows: int) -> tuple[PlanLine, ...]:
    if not num_rows:
        return ()
    num_bytes = footprint.comparison_bytes(spec, num_rows)
    return (
        PlanLine(components.COMPARISON, num_bytes, f"{num_rows} distributions over the vocabulary"),
    )


def _profiler(spec: ModelSpec, profiled: bool) -> tuple[PlanLine, ...]:
    if not profiled:
        return ()
    num_bytes = footprint.profiler_bytes(spec.num_layers)
    return (PlanLine(components.PROFILER, num_bytes, "spans, samples and times of layers"),)
