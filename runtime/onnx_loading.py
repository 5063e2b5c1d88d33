"""Loads a planned ONNX model so that it takes what was planned."""

from __future__ import annotations

from lowtide.memory.releaser import Releaser
from lowtide.models.onnx.model import OnnxModel
from lowtide.models.onnx.options import OnnxOptions
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.runtime.planning import PlannedModel
from lowtide.runtime.profiler import SILENT, Profiler


def load_onnx(
    planned: PlannedModel, spec: OnnxSpec, releasers: list[Releaser], profiler: Profiler = SILENT
) -> OnnxModel:
    """Open the session and make the cache, as the plan has them; `profiler` times both."""
    plan = planned.plan
    options = OnnxOptions(
        context=plan.context,
        max_rows=plan.max_rows,
        threads=planned.options.num_threads,
        provider=planned.options.provider,
        stage=profiler.span,
    )
    model = OnnxModel(spec, options)
    releasers.append(Releaser("background", model.trim))
    return model
