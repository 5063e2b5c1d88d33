"""Loads a planned ONNX model so that it takes what was planned."""

from __future__ import annotations

from lowtide.attention.bindings.onnx_ops import OnnxAttention, OnnxMatmul
from lowtide.memory.os.pages import trim_heap
from lowtide.memory.reclaim import Reclaimer
from lowtide.models.onnx.config import OnnxOptions
from lowtide.models.onnx.model import OnnxModel
from lowtide.models.onnx.read_spec import RepackPlan
from lowtide.models.onnx.rewrite.model import RewrittenOnnxModel
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.runtime.planning.plan import ResolvedModel
from lowtide.runtime.profiling.profiler import SILENT, Profiler


def load_onnx(
    planned: ResolvedModel, spec: OnnxSpec, reclaimers: list[Reclaimer], profiler: Profiler = SILENT
) -> tuple[OnnxModel, OnnxAttention | None]:
    """Open the session and make the cache, as the plan has them; `profiler` times both.

    Where our kernels attend in the graph, they are returned too; the model closes them.
    """
    options = _options(planned, profiler)
    attention: OnnxAttention | None = None
    model: OnnxModel
    if planned.policy.uses_native_kernels:
        attention = OnnxAttention(planned.options.num_threads)
        model = RewrittenOnnxModel(spec, options, attention, _products(spec, options))
    else:
        model = OnnxModel(spec, options)
    trim_heap()  # the tokenizer is read with twice what it keeps, which no packed copy takes up
    reclaimers.append(Reclaimer("background", model.trim))
    return model, attention


def _products(spec: OnnxSpec, options: OnnxOptions) -> OnnxMatmul | None:
    if spec.tiles is None or not isinstance(spec.packed, RepackPlan):
        return None
    return OnnxMatmul(spec.packed, spec.tiles, options.batch_size, options.threads)


def load_onnx_filter_context(
    model: RewrittenOnnxModel,
    planned: ResolvedModel,
    attention: OnnxAttention,
    reclaimers: list[Reclaimer],
    profiler: Profiler = SILENT,
) -> RewrittenOnnxModel:
    """Make another cache in the session of `model`, for passes that end early; to be closed before it."""
    assert isinstance(planned.spec, OnnxSpec), "the model has such a one"
    options = _options(planned, profiler)
    reader = RewrittenOnnxModel(planned.spec, options, attention, weights_of=model)
    reclaimers.append(Reclaimer("background", reader.trim))
    return reader


def _options(planned: ResolvedModel, profiler: Profiler) -> OnnxOptions:
    plan = planned.plan
    return OnnxOptions(
        context=plan.context,
        batch_size=plan.batch_size,
        threads=planned.options.num_threads,
        kv_type=plan.kv_type,
        provider=planned.options.provider,
        verify_batch=max(plan.verify_batch, 1),
        stage=profiler.span,
    )
