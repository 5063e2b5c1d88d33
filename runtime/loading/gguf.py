"""Loads a planned GGUF model so that it takes what was planned: pages untouched, weights given back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain

from lowtide.attention.bindings.library import guarded_aborts, unpopulated_maps
from lowtide.attention.bindings.llama_hook import GraphHook, keep_spans_apart, mapped_spans
from lowtide.memory.machine import read_machine
from lowtide.memory.os.file_mappings import FileMap, give_back, hold_in_large_pieces, read_file_maps
from lowtide.memory.os.kv_pages import KvPages, UntouchedBuffer, untouched_buffers
from lowtide.memory.plan.attention import FirstPass
from lowtide.memory.plan.estimates import kv_cells, kv_row_bytes, widest_product
from lowtide.memory.plan.line import FIRST_PASS
from lowtide.memory.reclaim import Releaser
from lowtide.models.gguf.draft_tree import GgufTreeModel
from lowtide.models.gguf.model import DeviceLayers, GgufModel, LoadOptions
from lowtide.models.spec import ModelSpec
from lowtide.runtime.planning.plan import PlannedModel
from lowtide.runtime.profiling.profiler import SILENT, Profiler

_maps_lock = threading.Lock()
"""Which maps are a model's own is told by what was there before it: one is loaded at a time."""


def load_gguf(
    planned: PlannedModel,
    hook: GraphHook | None,
    releasers: list[Releaser],
    profiler: Profiler = SILENT,
) -> GgufModel:
    """Load the weights and make the context, as the plan has them; `profiler` times both.

    Adds to `releasers` what can be given back of the model's memory.
    """
    plan, options = planned.plan, _options(planned, hook, profiler)
    if plan.kept_layers is not None:
        hold_in_large_pieces(planned.spec.paths, read_machine().available_bytes)
    with guarded_aborts(), untouched_buffers() as buffers, _new_maps(planned) as maps:
        if verifies_trees(planned) and hook is not None:
            model: GgufModel = GgufTreeModel(planned.spec, options, hook)
        else:
            model = GgufModel(planned.spec, options)
    if plan.kept_layers is not None and hook is not None:
        try:
            _stream_weights(planned.spec, maps, hook, plan.kept_layers)
        except BaseException:
            model.close()
            raise
    if hook is not None and planned.spec.packed_tensors:
        most_columns = widest_product(planned.spec)
        hook.read_packed(planned.spec.packed_tensors, plan.max_rows, most_columns)
    # Milder levels are for running answers, which would read the weights again at once.
    releasers += (
        Releaser("complete", partial(give_back, file_map)) for found in maps for file_map in found
    )
    profiler.cache_lies_in(buffers)
    _follow_use(model, planned, buffers, releasers)
    return model


def load_reader(
    model: GgufModel,
    planned: PlannedModel,
    hook: GraphHook,
    first_pass: FirstPass,
    releasers: list[Releaser],
    profiler: Profiler = SILENT,
) -> GgufModel:
    """Make another context on the weights of `model`, for passes that end early; to be closed before it."""
    options = _options(planned, hook, profiler)
    with guarded_aborts(), untouched_buffers() as buffers:
        reader = GgufModel(planned.spec, options, weights_of=model)
    profiler.cache_lies_in(buffers, FIRST_PASS)
    num_unused = 2 * (planned.spec.num_layers - first_pass.num_layers)
    _follow_use(reader, planned, buffers, releasers, num_unused)
    return reader


def _options(planned: PlannedModel, hook: GraphHook | None, profiler: Profiler) -> LoadOptions:
    plan = planned.plan
    return LoadOptions(
        context=plan.context,
        max_rows=plan.max_rows,
        threads=planned.options.num_threads,
        kv_type=plan.kv_type,
        memory_map=plan.memory_map,
        repack=plan.kept_layers is None and not planned.options.pack,
        eval_callback=hook.callback if hook else None,
        stage=profiler.span,
        gpu_layers=tuple(DeviceLayers(gpu.device.name, gpu.num_layers) for gpu in plan.gpus),
        gpu_attention=not planned.policy.uses_hook,
        verified_rows=max(plan.verified_rows, 1),
        sequences=plan.verified_rows if verifies_trees(planned) else 1,
    )


def verifies_trees(planned: PlannedModel) -> bool:
    """Whether drafts may have branches: our attention reads all keys of every layer, in one cache here."""
    spec, plan, policy = planned.spec, planned.plan, planned.policy
    one_cache = spec.sliding_window is None and not spec.recurrent_state_bytes and not plan.gpus
    return plan.verified_rows > 2 and policy.uses_hook and policy.takes_batches and one_cache


def _follow_use(
    model: GgufModel,
    planned: PlannedModel,
    buffers: Sequence[UntouchedBuffer],
    releasers: list[Releaser],
    num_unused: int = 0,
) -> None:
    """Give pages of the model's cache back as tokens are forgotten, where they can be told."""
    plan = planned.plan
    row_bytes = kv_row_bytes(planned.spec, plan.kv_type)
    if row_bytes is None or plan.gpu_cache_bytes:
        return
    pages = KvPages(
        buffers,
        num_tensors=2 * planned.spec.num_layers,
        num_cells=kv_cells(plan.context),
        row_bytes=row_bytes,
        num_unused=num_unused,
    )
    model.on_cut = pages.cut
    releasers.append(Releaser("background", lambda: pages.trim(model.num_tokens)))


@contextlib.contextmanager
def _new_maps(planned: PlannedModel) -> Iterator[list[frozenset[FileMap]]]:
    """Yield a list that holds, after the block, where each of the model's files was mapped inside it.

    Where weights are to be given back they are not even filled in.
    """
    paths, maps = planned.spec.paths, list[frozenset[FileMap]]()
    if not planned.plan.memory_map:
        yield maps
        return
    unfilled = unpopulated_maps() if planned.plan.kept_layers is not None else nullcontext()
    with _maps_lock, unfilled:
        before = [read_file_maps(path) for path in paths]
        yield maps
        maps += (read_file_maps(path) - old for path, old in zip(paths, before, strict=True))


def _stream_weights(
    spec: ModelSpec, maps: Sequence[frozenset[FileMap]], hook: GraphHook, kept_layers: int
) -> None:
    spans = mapped_spans(spec, maps)
    keep_spans_apart(spec, spans, chain.from_iterable(maps))
    hook.stream_weights(spans, _kept(spec, kept_layers))


def _kept(spec: ModelSpec, kept_layers: int) -> bytes:
    """A flag for each group of weights: the first layers stay."""
    in_layers = (group.layer is not None for group in spec.weight_groups)
    return bytes(is_layer and i < kept_layers for i, is_layer in enumerate(in_layers))
