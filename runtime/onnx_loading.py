"""Loads a planned ONNX model so that it takes what was planned."""

from __future__ import annotations

from lowtide.attention.dense import Dense
from lowtide.attention.onnx_attention import OnnxAttention
from lowtide.attention.policy import Steering
from lowtide.attention.tidal import Tidal
from lowtide.memory.releaser import Releaser
from lowtide.models.onnx.model import OnnxModel
from lowtide.models.onnx.options import OnnxOptions
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.onnx.swapped.model import SwappedModel
from lowtide.runtime.planning import PlannedModel
from lowtide.runtime.profiler import SILENT, Profiler


def load_onnx(
    planned: PlannedModel, spec: OnnxSpec, releasers: list[Releaser], profiler: Profiler = SILENT
) -> tuple[OnnxModel, OnnxAttention | None]:
    """Open the session and make the cache, as the plan has them; `profiler` times both.

    Where our kernels attend in the graph, they are returned too; the model closes them.
    """
    plan = planned.plan
    options = OnnxOptions(
        context=plan.context,
        max_rows=plan.max_rows,
        threads=planned.options.num_threads,
        kv_type=plan.kv_type,
        provider=planned.options.provider,
        verified_rows=max(plan.verified_rows, 1),
        stage=profiler.span,
    )
    attention: OnnxAttention | None = None
    model: OnnxModel
    if planned.policy.uses_hook:
        attention = OnnxAttention(planned.options.num_threads)
        model = SwappedModel(spec, options, attention)
    else:
        model = OnnxModel(spec, options)
    releasers.append(Releaser("background", model.trim))
    return model, attention


def install_policy(planned: PlannedModel, attention: OnnxAttention) -> Steering:
    """Give the kernels in the graph the plan's policy and return what tells it of each pass."""
    policy = planned.policy
    assert isinstance(policy, Dense | Tidal), "the plan allows no other"
    return policy.install(attention, planned.spec)
