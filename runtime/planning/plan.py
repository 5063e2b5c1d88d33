"""From what the user asks for to a memory plan, before any weight is loaded.

`lowtide plan` stops here; `Runtime.open` goes on to `runtime/loading/load.py`.
"""

from __future__ import annotations

import os
from dataclasses import replace

from lowtide.attention.policy import AttentionPolicy
from lowtide.memory.budget import Budget
from lowtide.memory.machine import read_machine
from lowtide.memory.plan.planner import plan_memory
from lowtide.memory.plan.speculation import SpeculationConfig
from lowtide.models.arguments.names import option
from lowtide.models.catalog import resolve
from lowtide.models.errors import BadOption
from lowtide.models.kind import require_decoder
from lowtide.models.model import Model
from lowtide.models.onnx.config import ENGINE as ONNXRUNTIME
from lowtide.models.read_spec import read_spec
from lowtide.models.spec import ModelSpec
from lowtide.runtime.backends.backend import Backend, PlannedPrompt, ResolvedModel
from lowtide.runtime.backends.config import LoadConfig
from lowtide.runtime.backends.gguf import GgufBackend
from lowtide.runtime.speculation.options import AUTO, FREE_DRAFTS, SpeculationArg
from lowtide.runtime.speculation.worth import costs_key

__all__ = [
    "LoadConfig",
    "ResolvedModel",
    "backend_for",
    "find_spec",
    "plan_model",
    "plan_reference",
    "plan_spec",
]

_GGUF = GgufBackend()


def backend_for(spec: ModelSpec) -> Backend:
    """Return the backend that runs models of this spec. That of ONNX models is imported for these alone."""
    if spec.engine != ONNXRUNTIME:
        return _GGUF
    from lowtide.runtime.backends.onnx import OnnxBackend

    return OnnxBackend()


def plan_reference(reference: str | os.PathLike[str] | None, options: LoadConfig) -> ResolvedModel:
    """Find the model, read its headers and plan; load no weights and refuse nothing that can be read."""
    return plan_spec(find_spec(reference, offline=options.offline), options)


def find_spec(reference: str | os.PathLike[str] | None, *, offline: bool = False) -> ModelSpec:
    """Find the model and read its headers."""
    return read_spec(resolve(reference, offline=offline))


def plan_model(model: Model, options: LoadConfig) -> ResolvedModel:
    """Plan a `Model` object of the caller's, which is loaded already."""
    from lowtide.runtime.backends.user_model import UserBackend

    backend = UserBackend(model, backend_for(model.spec))
    return plan_spec(model.spec, options, backend)


def plan_spec(
    spec: ModelSpec,
    options: LoadConfig,
    backend: Backend | None = None,
    prompt: PlannedPrompt | None = None,
) -> ResolvedModel:
    """Plan a model with a known spec; `backend` None is the one for its kind of file.

    The plan makes room for `prompt` and its answer before anything else. Raises `UnsupportedModel` for a model that
    cannot generate text.
    """
    require_decoder(spec, spec.kind)
    backend = backend or backend_for(spec)
    if options.chat_template is not None:
        spec = replace(spec, chat_template=str(options.chat_template))
    machine = read_machine()
    budget = Budget.from_user(options.memory, machine)
    spec, policy = backend.resolve(spec, options, options.policy(spec))
    # Before the process is measured: GPU drivers take memory of their own in it.
    gpu = options.gpu_budget(policy)
    speculation = _speculation(spec, options, backend, policy, on_gpu=gpu is not None)
    with backend.measure(spec, policy, budget, prompt) as measured:
        baseline, sizes = measured.baseline, measured.sizes
        if gpu is not None and gpu.holds_cache:
            baseline = replace(baseline, kv_on_demand=False)
        request = options.plan_request(policy, gpu, speculation)
        plan = plan_memory(spec, request, budget, baseline, sizes)
        if prompt is not None and (plan.downgrades or not plan.fits):
            # What is given up first depends on the prompt. A plan that gives nothing up is the same for every one.
            baseline = replace(baseline, prompt_tokens=measured.count_prompt())
            request = options.plan_request(policy, gpu, speculation, baseline.prompt_tokens)
            plan = plan_memory(spec, request, budget, baseline, sizes)
    return ResolvedModel(
        spec=spec,
        machine=machine,
        plan=plan,
        options=options,
        policy=policy,
        baseline=baseline,
        sizes=sizes,
        backend=backend,
        gpu=gpu,
        speculation=speculation,
    )


def _speculation(
    spec: ModelSpec,
    options: LoadConfig,
    backend: Backend,
    policy: AttentionPolicy,
    *,
    on_gpu: bool,
) -> SpeculationConfig | None:
    choice = SpeculationArg.parse(options.speculate)
    if choice.model is not None and not backend.supports_draft_models:
        raise BadOption(
            f"{option('speculate')} names the draft model {choice.model}, but {spec.name} is an ONNX model: choose "
            f"{', '.join(FREE_DRAFTS)} or {AUTO}, or use the model as a GGUF file"
        )
    return choice.resolve(
        spec,
        key=costs_key(spec, options, policy),
        kv_type=options.kv_type or spec.kv_types[0],
        branches=backend.verifies_trees(spec, policy) and not on_gpu,
        offline=options.offline,
    )
