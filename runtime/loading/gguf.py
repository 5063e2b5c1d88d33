"""Loads a planned GGUF model so that it takes what was planned: pages untouched, weights given back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain

from lowtide.attention.bindings.library import guarded_aborts, lazy_mappings
from lowtide.attention.bindings.llama_hook import LlamaHook, isolate_spans, mapped_spans
from lowtide.memory.machine import read_machine
from lowtide.memory.os.file_mappings import FileMap, read_file_maps, release_pages, use_large_folios
from lowtide.memory.os.kv_pages import DemandZeroBuffer, KVPageReclaimer, demand_zero_buffers
from lowtide.memory.plan.attention import FilterPrefill
from lowtide.memory.plan.estimates import kv_token_bytes, max_matmul_width, padded_context
from lowtide.memory.plan.line import FILTER_PREFILL
from lowtide.memory.reclaim import Reclaimer
from lowtide.models.gguf.draft_tree import GgufTreeModel
from lowtide.models.gguf.model import DeviceLayers, GgufModel, LoadOptions
from lowtide.models.spec import ModelSpec
from lowtide.runtime.planning.plan import ResolvedModel
from lowtide.runtime.profiling.profiler import SILENT, Profiler

_maps_lock = threading.Lock()
"""Which maps are a model's own is told by what was there before it: one is loaded at a time."""


def load_gguf(
    planned: ResolvedModel,
    hook: LlamaHook | None,
    reclaimers: list[Reclaimer],
    profiler: Profiler = SILENT,
) -> GgufModel:
    """Load the weights and make the context, as the plan has them; `profiler` times both.

    Adds to `reclaimers` what can be given back of the model's memory.
    """
    plan, options = planned.plan, _options(planned, hook, profiler)
    if plan.resident_layers is not None:
        use_large_folios(planned.spec.paths, read_machine().available_bytes)
    with guarded_aborts(), demand_zero_buffers() as buffers, _new_maps(planned) as maps:
        if verifies_trees(planned) and hook is not None:
            model: GgufModel = GgufTreeModel(planned.spec, options, hook)
        else:
            model = GgufModel(planned.spec, options)
    if plan.resident_layers is not None and hook is not None:
        try:
            _stream_weights(planned.spec, maps, hook, plan.resident_layers)
        except BaseException:
            model.close()
            raise
    if hook is not None and planned.spec.repacked_tensors:
        most_columns = max_matmul_width(planned.spec)
        hook.read_repacked(planned.spec.repacked_tensors, plan.batch_size, most_columns)
    # Milder levels are for running answers, which would read the weights again at once.
    reclaimers += (
        Reclaimer("complete", partial(release_pages, file_map))
        for found in maps
        for file_map in found
    )
    profiler.cache_lies_in(buffers)
    _follow_use(model, planned, buffers, reclaimers)
    return model


def load_filter_context(
    model: GgufModel,
    planned: ResolvedModel,
    hook: LlamaHook,
    filter_prefill: FilterPrefill,
    reclaimers: list[Reclaimer],
    profiler: Profiler = SILENT,
) -> GgufModel:
    """Make another context on the weights of `model`, for passes that end early; to be closed before it."""
    options = _options(planned, hook, profiler)
    with guarded_aborts(), demand_zero_buffers() as buffers:
        reader = GgufModel(planned.spec, options, weights_of=model)
    profiler.cache_lies_in(buffers, FILTER_PREFILL)
    num_unused = 2 * (planned.spec.num_layers - filter_prefill.num_layers)
    _follow_use(reader, planned, buffers, reclaimers, num_unused)
    return reader


def _options(planned: ResolvedModel, hook: LlamaHook | None, profiler: Profiler) -> LoadOptions:
    plan = planned.plan
    return LoadOptions(
        context=plan.context,
        batch_size=plan.batch_size,
        threads=planned.options.num_threads,
        kv_type=plan.kv_type,
        memory_map=plan.memory_map,
        repack=plan.resident_layers is None and not planned.options.repack,
        eval_callback=hook.callback if hook else None,
        stage=profiler.span,
        gpu_layers=tuple(DeviceLayers(gpu.device.name, gpu.num_layers) for gpu in plan.gpus),
        gpu_attention=not planned.policy.uses_native_kernels,
        verify_batch=max(plan.verify_batch, 1),
        sequences=plan.verify_batch if verifies_trees(planned) else 1,
    )


def verifies_trees(planned: ResolvedModel) -> bool:
    """Whether drafts may have branches: our attention reads all keys of every layer, in one cache here."""
    spec, plan, policy = planned.spec, planned.plan, planned.policy
    one_cache = spec.sliding_window is None and not spec.recurrent_state_bytes and not plan.gpus
    return (
        plan.verify_batch > 2 and policy.uses_native_kernels and policy.supports_batch and one_cache
    )


def _follow_use(
    model: GgufModel,
    planned: ResolvedModel,
    buffers: Sequence[DemandZeroBuffer],
    reclaimers: list[Reclaimer],
    num_unused: int = 0,
) -> None:
    """Give pages of the model's cache back as tokens are forgotten, where they can be told."""
    plan = planned.plan
    row_bytes = kv_token_bytes(planned.spec, plan.kv_type)
    if row_bytes is None or plan.gpu_cache_bytes:
        return
    pages = KVPageReclaimer(
        buffers,
        num_tensors=2 * planned.spec.num_layers,
        num_slots=padded_context(plan.context),
        token_bytes=row_bytes,
        num_unused=num_unused,
    )
    model.on_cut = pages.truncate
    reclaimers.append(Reclaimer("background", lambda: pages.release_pages(model.num_tokens)))


@contextlib.contextmanager
def _new_maps(planned: ResolvedModel) -> Iterator[list[frozenset[FileMap]]]:
    """Yield a list that holds, after the block, where each of the model's files was mapped inside it.

    Where weights are to be given back they are not even filled in.
    """
    paths, maps = planned.spec.paths, list[frozenset[FileMap]]()
    if not planned.plan.memory_map:
        yield maps
        return
    unfilled = lazy_mappings() if planned.plan.resident_layers is not None else nullcontext()
    with _maps_lock, unfilled:
        before = [read_file_maps(path) for path in paths]
        yield maps
        maps += (read_file_maps(path) - old for path, old in zip(paths, before, strict=True))


def _stream_weights(
    spec: ModelSpec, maps: Sequence[frozenset[FileMap]], hook: LlamaHook, resident_layers: int
) -> None:
    spans = mapped_spans(spec, maps)
    isolate_spans(spec, spans, chain.from_iterable(maps))
    hook.stream_weights(spans, _kept(spec, resident_layers))


def _kept(spec: ModelSpec, resident_layers: int) -> bytes:
    """A flag for each group of weights: the first layers stay."""
    in_layers = (group.layer is not None for group in spec.weight_groups)
    return bytes(is_layer and i < resident_layers for i, is_layer in enumerate(in_layers))
