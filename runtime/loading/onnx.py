"""Loads a planned ONNX model so that it takes what was planned."""

from __future__ import annotations

from lowtide.attention.bindings.onnx_ops import OnnxAttention, OnnxProducts
from lowtide.memory.os.pages import trim_heap
from lowtide.memory.reclaim import Releaser
from lowtide.models.onnx.config import OnnxOptions
from lowtide.models.onnx.model import OnnxModel
from lowtide.models.onnx.read_spec import PackedForm
from lowtide.models.onnx.rewrite.model import SwappedModel
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.runtime.planning.plan import PlannedModel
from lowtide.runtime.profiling.profiler import SILENT, Profiler


def load_onnx(
    planned: PlannedModel, spec: OnnxSpec, releasers: list[Releaser], profiler: Profiler = SILENT
) -> tuple[OnnxModel, OnnxAttention | None]:
    """Open the session and make the cache, as the plan has them; `profiler` times both.

    Where our kernels attend in the graph, they are returned too; the model closes them.
    """
    options = _options(planned, profiler)
    attention: OnnxAttention | None = None
    model: OnnxModel
    if planned.policy.uses_hook:
        attention = OnnxAttention(planned.options.num_threads)
        model = SwappedModel(spec, options, attention, _products(spec, options))
    else:
        model = OnnxModel(spec, options)
    trim_heap()  # the tokenizer is read with twice what it keeps, which no packed copy takes up
    releasers.append(Releaser("background", model.trim))
    return model, attention


def _products(spec: OnnxSpec, options: OnnxOptions) -> OnnxProducts | None:
    if spec.panels is None or not isinstance(spec.packed, PackedForm):
        return None
    return OnnxProducts(spec.packed, spec.panels, options.max_rows, options.threads)


def load_onnx_reader(
    model: SwappedModel,
    planned: PlannedModel,
    attention: OnnxAttention,
    releasers: list[Releaser],
    profiler: Profiler = SILENT,
) -> SwappedModel:
    """Make another cache in the session of `model`, for passes that end early; to be closed before it."""
    assert isinstance(planned.spec, OnnxSpec), "the model has such a one"
    options = _options(planned, profiler)
    reader = SwappedModel(planned.spec, options, attention, weights_of=model)
    releasers.append(Releaser("background", reader.trim))
    return reader


def _options(planned: PlannedModel, profiler: Profiler) -> OnnxOptions:
    plan = planned.plan
    return OnnxOptions(
        context=plan.context,
        max_rows=plan.max_rows,
        threads=planned.options.num_threads,
        kv_type=plan.kv_type,
        provider=planned.options.provider,
        verified_rows=max(plan.verified_rows, 1),
        stage=profiler.span,
    )
