"""From what the user asks for to a memory plan, before any weight is loaded.

`lowtide plan` stops here; `Runtime.open` goes on to `runtime/loading/load.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from lowtide.attention.policy import AttentionPolicy
from lowtide.memory.budget import Budget
from lowtide.memory.machine import read_machine
from lowtide.memory.plan.driver import ESTIMATED, LEFT_OUT, DriverMemory
from lowtide.memory.plan.gpu import GpuBudget
from lowtide.memory.plan.plan import MemoryPlan, PlanRequest
from lowtide.memory.plan.planner import plan_memory
from lowtide.memory.plan.speculation.choices import SpeculationConfig
from lowtide.models.arguments.names import option
from lowtide.models.catalog import resolve
from lowtide.models.errors import BadOption
from lowtide.models.kind import require_decoder
from lowtide.models.model import Model
from lowtide.models.onnx.config import ENGINE as ONNXRUNTIME
from lowtide.models.read_spec import read_spec
from lowtide.models.spec import ModelSpec
from lowtide.runtime.backends.backend import Backend, PlannedPrompt, ResolvedModel
from lowtide.runtime.backends.config import EXACT, LoadConfig
from lowtide.runtime.backends.gguf import GgufBackend
from lowtide.runtime.backends.kernels.kernel_choice import NO_KERNELS, KernelChoice
from lowtide.runtime.planning.quality import ExpectedLength, choose, stays_exact
from lowtide.runtime.planning.together import require_together
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

MOST_MEASUREMENTS = 4
"""With what was measured a device may get more layers, or a plan other batches; then it is measured again."""
UNKNOWN_ANSWER = 512
"""Tokens of an answer whose length is not known."""
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
    cannot generate text, and `BadOption` where `sequences` are asked for and the model or its attention computes one.
    """
    require_decoder(spec, spec.kind)
    backend = backend or backend_for(spec)
    planned = _plan_spec(spec, options, backend, prompt)
    if options.sequences > 1:
        require_together(planned, f"{options.sequences} answers together")
    return planned


def _plan_spec(
    spec: ModelSpec, options: LoadConfig, backend: Backend, prompt: PlannedPrompt | None
) -> ResolvedModel:
    """Plan with the first choice of kernels that gives nothing up, or the one whose plan holds most."""
    if options.chat_template is not None:
        spec = replace(spec, chat_template=str(options.chat_template))
    planned: ResolvedModel | None = None
    quality, options = options.quality, replace(options, quality=EXACT)
    for choice in backend.kernel_choices(spec, options):
        found = _plan(spec, options, backend, choice, prompt, counts_prompt=quality != EXACT)
        if planned is None or _holds_more(found.plan, planned.plan):
            planned = found
        if planned.plan.fits and not planned.plan.downgrades:
            break
    assert planned is not None, "a backend names at least one choice"
    if quality == EXACT:
        return planned
    return _with_quality(quality, spec, planned, options, backend, prompt)


def _with_quality(
    quality: str,
    spec: ModelSpec,
    exact: ResolvedModel,
    options: LoadConfig,
    backend: Backend,
    prompt: PlannedPrompt | None,
) -> ResolvedModel:
    """Plan with the policy that the quality takes; `exact` says why where there is none, or no room for it."""
    if not exact.policy.uses_native_kernels:
        reason = exact.engine_kernels_reason or "the budget has no room for lowtide's kernels"
        chosen = stays_exact(quality, reason)
        return replace(exact, quality=chosen)
    known = exact.baseline.prompt_tokens or options.expected_tokens or exact.plan.kv_tokens
    answer = min(prompt.answer_tokens if prompt is not None else UNKNOWN_ANSWER, known)
    length = ExpectedLength(
        prompt_tokens=known - answer,
        answer_tokens=answer,
        is_question=prompt is not None and prompt.is_question,
    )
    chosen = choose(spec, quality, length)
    if chosen.found is None:
        return replace(exact, quality=chosen)
    policy = replace(options, attention=chosen.found.policy)
    for choice in backend.kernel_choices(spec, policy):
        found = _plan(spec, policy, backend, choice, prompt, counts_prompt=True)
        if found.plan.fits and found.plan.kv_tokens >= min(known, exact.plan.kv_tokens):
            return replace(found, quality=chosen)
    reason = f"the budget has no room for {chosen.found.policy.name}"
    return replace(exact, quality=stays_exact(quality, reason))


def _holds_more(plan: MemoryPlan, other: MemoryPlan) -> bool:
    """Whether a plan fits where the other does not, or has room for more tokens, or would fit a smaller budget."""
    if plan.fits == other.fits:
        if plan.fits:
            return plan.kv_tokens > other.kv_tokens
        return plan.lower_bound_bytes < other.lower_bound_bytes
    return plan.fits


def _plan(
    spec: ModelSpec,
    options: LoadConfig,
    backend: Backend,
    choice: KernelChoice,
    prompt: PlannedPrompt | None,
    *,
    counts_prompt: bool = False,
) -> ResolvedModel:
    """Plan with the kernels of `choice` where the options leave them open and the budget has room."""
    machine = read_machine()
    budget = Budget.from_user(options.memory, machine)
    opened = options.with_kernels(choice)
    original, (spec, policy) = spec, backend.resolve(spec, opened, opened.policy(spec))
    # Before the process is measured: GPU drivers take memory of their own in it.
    gpu = opened.gpu_budget(policy)
    with backend.measure(spec, policy, budget, prompt) as measured:
        baseline, sizes = measured.baseline, measured.sizes
        choice = backend.measured_choice(spec, choice, budget)
        opened = options.with_kernels(choice)
        spec, policy = backend.resolve(original, opened, opened.policy(original))
        speculation = _speculation(spec, opened, backend, policy, on_gpu=gpu is not None)
        if gpu is not None and gpu.holds_cache:
            baseline = replace(baseline, kv_on_demand=False)
        left_open = options.left_open(choice) if backend.plans_without_kernels else NO_KERNELS

        def request_for(prompt_tokens: int) -> PlanRequest:
            return opened.plan_request(policy, gpu, speculation, prompt_tokens, left_open)

        def planned_for(prompt_tokens: int) -> tuple[PlanRequest, MemoryPlan]:
            return _with_drivers(
                request_for(prompt_tokens),
                lambda request: plan_memory(spec, request, budget, baseline, sizes),
                lambda plan, gpu: backend.driver_memory(spec, plan, gpu),
            )

        request, plan = planned_for(0)
        if prompt is not None and (counts_prompt or plan.downgrades or not plan.fits):
            # What is given up first depends on the prompt. A plan that gives nothing up is the same for every one.
            baseline = replace(baseline, prompt_tokens=measured.count_prompt())
            request, plan = planned_for(baseline.prompt_tokens)
    if request.has_optional_kernels and not plan.own_kernels:
        choice = choice.without(
            attention=left_open.attention,
            repack=left_open.repack,
            reason=None,  # the plan says so itself
        )
        opened = options.with_kernels(choice)
        spec, policy = backend.resolve(original, opened, opened.policy(original))
        # Draft trees need lowtide's attention.
        plan = replace(plan, branches=plan.branches and policy.uses_native_kernels)
    return ResolvedModel(
        spec=spec,
        machine=machine,
        plan=plan,
        request=request,
        options=opened,
        policy=policy,
        baseline=baseline,
        sizes=sizes,
        backend=backend,
        gpu=request.gpu,
        speculation=speculation,
        engine_kernels_reason=options.reason_for_engine(choice),
    )


def _with_drivers(
    request: PlanRequest,
    plan_for: Callable[[PlanRequest], MemoryPlan],
    measure: Callable[[MemoryPlan, GpuBudget], DriverMemory],
) -> tuple[PlanRequest, MemoryPlan]:
    """Return the request with what the drivers of its GPUs take, and its plan.

    What they take is measured with the layers that a device would get, and decides how many it gets. A plan that would
    not even fit without them is made with an estimate.
    """
    if request.gpu is None:
        return request, plan_for(request)
    gpu = replace(request.gpu, driver=LEFT_OUT)
    for _ in range(MOST_MEASUREMENTS):
        plan = plan_for(replace(request, gpu=gpu))
        if not plan.gpus or not plan.fits:
            break
        driver = measure(plan, gpu)
        if driver == gpu.driver:
            break
        gpu = replace(gpu, driver=driver)
        if not driver.is_measured:
            break  # asking again would measure again in vain
    if gpu.driver is LEFT_OUT:
        gpu = replace(gpu, driver=ESTIMATED)
    request = replace(request, gpu=gpu)
    return request, plan_for(request)


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
