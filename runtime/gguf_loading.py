"""Loads a planned GGUF model so that it takes what was planned: pages untouched, weights given back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from lowtide.attention.abort_guard import guarded_aborts
from lowtide.attention.graph_hook import GraphHook
from lowtide.attention.unpopulated_maps import unpopulated_maps
from lowtide.attention.weight_stream import mapped_spans
from lowtide.memory.file_maps import read_file_maps
from lowtide.memory.footprint import kv_cells, kv_row_bytes
from lowtide.memory.kv_pages import KvPages
from lowtide.memory.untouched_buffers import untouched_buffers
from lowtide.models.gguf_model import GgufModel
from lowtide.models.gguf_options import LoadOptions
from lowtide.models.spec import ModelSpec
from lowtide.runtime.planning import PlannedModel
from lowtide.runtime.profiler import SILENT, Profiler

_maps_lock = threading.Lock()
"""Which maps are a model's own is told by what was there before it: one is loaded at a time."""


def load_gguf(
    planned: PlannedModel, hook: GraphHook | None, profiler: Profiler = SILENT
) -> GgufModel:
    """Load the weights and make the context, as the plan has them; `profiler` times both."""
    plan = planned.plan
    options = LoadOptions(
        context=plan.context,
        max_rows=plan.max_rows,
        threads=planned.options.num_threads,
        kv_type=plan.kv_type,
        memory_map=plan.memory_map,
        repack=plan.kept_layers is None,
        eval_callback=hook.callback if hook else None,
        stage=profiler.span,
    )
    with guarded_aborts(), untouched_buffers() as buffers, _weights_given_back(planned, hook):
        model = GgufModel(planned.spec, options)
    profiler.cache_lies_in(buffers)
    row_bytes = kv_row_bytes(planned.spec, plan.kv_type)
    if row_bytes is not None:
        model.on_cut = KvPages(
            buffers,
            num_tensors=2 * planned.spec.num_layers,
            num_cells=kv_cells(plan.context),
            row_bytes=row_bytes,
        ).cut
    return model


@contextlib.contextmanager
def _weights_given_back(planned: PlannedModel, hook: GraphHook | None) -> Iterator[None]:
    """Have the weights that are mapped inside the block given back after use, where that is planned."""
    spec, kept_layers = planned.spec, planned.plan.kept_layers
    if kept_layers is None or hook is None:
        yield
        return
    with _maps_lock, unpopulated_maps():
        before = [read_file_maps(path) for path in spec.paths]
        yield
        maps = [read_file_maps(path) - old for path, old in zip(spec.paths, before, strict=True)]
    hook.stream_weights(mapped_spans(spec, maps), _kept(spec, kept_layers))


def _kept(spec: ModelSpec, kept_layers: int) -> bytes:
    """A flag for each group of weights: the first layers stay."""
    in_layers = (group.layer is not None for group in spec.weight_groups)
    return bytes(is_layer and i < kept_layers for i, is_layer in enumerate(in_layers))
