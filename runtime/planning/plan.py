"""From what the user asked to a plan, before anything is loaded: resolve, read headers, plan.

Knows no tokens. `lowtide plan` stops here; `Runtime.open` goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lowtide.attention.dense import Dense
from lowtide.attention.policy import AttentionPolicy
from lowtide.attention.registry import parse_policy
from lowtide.memory.budget import Budget
from lowtide.memory.machine import Machine, read_machine, usable_cores
from lowtide.memory.plan.attention import AttentionMemory
from lowtide.memory.plan.estimates import ContextSizes
from lowtide.memory.plan.gpu import GpuBudget, parse_gpu_layers
from lowtide.memory.plan.plan import MemoryPlan, PlanRequest, ProcessBaseline
from lowtide.memory.plan.planner import plan_memory, require_fit
from lowtide.memory.plan.speculation import SpeculationConfig
from lowtide.memory.process import read_process_memory
from lowtide.memory.units import BadSize, OverBudget, parse_size
from lowtide.models.catalog import resolve
from lowtide.models.errors import BadOption
from lowtide.models.gguf.gpu import require_gpus
from lowtide.models.onnx.config import CPU, provider_name
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.read_spec import read_spec
from lowtide.models.spec import ModelSpec
from lowtide.runtime.planning.gguf import measured_baseline
from lowtide.runtime.planning.onnx import (
    OnnxSizes,
    RewrittenSizes,
    measured_onnx_baseline,
    rewritten_spec,
)
from lowtide.runtime.speculation.options import SpeculationArg


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """What to open and how much it may take.

    `memory` is a size ("1GiB", "50%"), `context` a number of tokens, `kv_type` one of f16, q8_0, q4_0;
    None leaves the choice to the plan. `threads` None means the cores this process may use. `attention` is
    a policy or its name: "llama" (llama.cpp's own kernels), "dense" (ours: exact, and a row's result does
    not depend on the batch or the threads) or "tidal" (`Tidal`: an approximation, "tidal:k=512").
    `gpu_layers` is how many layers go to the GPUs, as llama.cpp counts them, or "auto", as many as fit
    `gpu_memory`, a size on each device (None: 90 % of what it has free); both None leave the GPUs alone.
    `compared_tokens` is how many distributions a measurement keeps, `attention_memory` what attention takes
    if that is not the policy's own, `profiled` whether a profiler watches. `prefix_cache` is a size
    ("64MiB") for KV states of prompts that others replaced; 0 keeps none. `pack` has matrix products
    computed by our kernels too, from a packed copy of the weights in the cache folder, which is made where
    there is none;
    an ONNX graph's attention is "dense" then where it would be its own.
    `speculate` is "off", "ngram", "trigram", "auto" or a draft model, each with ":rows=N" for the most
    rows of a verification. `provider` is the execution provider of an ONNX model, by its short name.
    """

    memory: str | int | None = None
    context: int | None = None
    kv_type: str | None = None
    batch_size: int | None = None
    threads: int | None = None
    attention: str | AttentionPolicy = "llama"
    gpu_layers: int | str | None = None
    gpu_memory: str | int | None = None
    offline: bool = False
    compared_tokens: int = 0
    profiled: bool = False
    attention_memory: AttentionMemory | None = None
    prefix_cache: str | int = 0
    repack: bool = False
    speculate: str = "off"
    provider: str = CPU

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= 512:
            raise BadOption(f"threads is {self.threads}, 1 to 512 are wanted")
        parse_policy(self.attention)
        _ = self.prefix_bytes
        SpeculationArg.parse(self.speculate)
        if parse_gpu_layers(self.gpu_layers) == 0 and self.gpu_memory is not None:
            raise BadOption("gpu_memory is given, and gpu_layers is 0: give one of them up")
        if self.repack and (self.gpu_layers or self.gpu_memory is not None):
            raise BadOption(
                "pack is for products on the processor, and layers are to go to a GPU: give one of them up"
            )

    def policy(self, spec: ModelSpec) -> AttentionPolicy:
        """Return the attention policy, fitted to the model; raises `BadOption` where that cannot be."""
        return parse_policy(self.attention).resolve(spec)

    def gpu_budget(self, policy: AttentionPolicy) -> GpuBudget | None:
        """Return what the devices may take; None where none is wanted.

        Raises `NoGpu` where there is none. Our own attention runs on the processor: its cache stays there.
        """
        layers = parse_gpu_layers(self.gpu_layers)
        if layers == 0 or (self.gpu_layers is None and self.gpu_memory is None):
            return None
        if policy.prompt_selector is not None:
            raise BadOption(
                f"attention is {policy.name}, whose first pass ends early, and layers are to go to a GPU: "
                "give one of them up"
            )
        devices = require_gpus("--gpu-memory" if self.gpu_layers is None else "--gpu-layers")
        return GpuBudget.from_user(
            layers, self.gpu_memory, devices, holds_cache=not policy.uses_native_kernels
        )

    def plan_request(
        self,
        policy: AttentionPolicy,
        gpu: GpuBudget | None = None,
        speculation: SpeculationConfig | None = None,
    ) -> PlanRequest:
        """The part that the plan looks at."""
        return PlanRequest(
            context=self.context,
            kv_type=self.kv_type,
            batch_size=self.batch_size,
            threads=self.num_threads,
            attention_threads=self.num_threads if policy.uses_native_kernels else 0,
            attention=self.attention_memory or policy.memory,
            compared_tokens=self.compared_tokens,
            profiled=self.profiled,
            prefix_bytes=self.prefix_bytes,
            repacked=self.repack,
            gpu=gpu,
            speculation=speculation,
        )

    @property
    def prefix_bytes(self) -> int:
        """What the prefix cache may hold; raises `BadSize` where `prefix_cache` is no size."""
        stated = str(self.prefix_cache).strip()
        try:
            return 0 if stated == "0" else parse_size(stated)
        except BadSize:
            raise BadSize(
                f"a prefix cache of {stated!r} cannot be made: write a size such as 64MiB, or 0 for none"
            ) from None

    @property
    def num_threads(self) -> int:
        """The threads to compute with."""
        return self.threads or usable_cores()


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """A model's spec, the machine and the plan for them; `baseline` is what the plan was made for.

    `policy` is the attention policy, fitted to the model.
    """

    spec: ModelSpec
    machine: Machine
    plan: MemoryPlan
    options: LoadConfig
    policy: AttentionPolicy
    baseline: ProcessBaseline
    sizes: ContextSizes
    gpu: GpuBudget | None = None
    speculation: SpeculationConfig | None = None

    @property
    def attention_in_words(self) -> str:
        """Return who attends and how: the policy, or the graph's own where that runs whole."""
        if isinstance(self.spec, OnnxSpec) and not self.policy.uses_native_kernels:
            return self.spec.attention
        return str(self.policy)

    def require_nothing_of_llama(self) -> None:
        """Raise `BadOption` where a model of the caller's own is to do what llama.cpp alone does."""
        wanted = "gpu_layers are wanted, which" if self.gpu else None
        if self.options.repack:
            wanted = "pack is wanted, which"
        if self.policy.uses_native_kernels:
            wanted = f"attention is {self.policy.name!r}, which"
        if wanted is not None:
            raise BadOption(
                f"{wanted} runs in llama.cpp's graph alone: give the model as a file, or leave "
                f"{wanted.split()[0]} out"
            )

    def require_fit(self) -> None:
        """Raise `OverBudget` where the plan, or what the process did before, is over the budget."""
        options = self.options.plan_request(self.policy, self.gpu, self.speculation)
        require_fit(self.plan, self.spec, options, self.baseline, self.sizes)
        peak = read_process_memory().peak_bytes
        if peak > self.plan.budget.num_bytes:
            raise OverBudget(
                "this process, by what it did before lowtide was opened,",
                peak,
                self.plan.budget.num_bytes,
                "raise --memory, or open the model in a process of its own",
            )


def plan_reference(reference: str | Path | None, options: LoadConfig) -> ResolvedModel:
    """Find the model, read its headers and plan; loads no weights and refuses nothing that is readable."""
    return plan_spec(find_spec(reference, offline=options.offline), options)


def find_spec(reference: str | Path | None, *, offline: bool = False) -> ModelSpec:
    """Find the model and read its headers."""
    return read_spec(resolve(reference, offline=offline))


def plan_spec(spec: ModelSpec, options: LoadConfig) -> ResolvedModel:
    """Plan a model whose spec is known."""
    machine = read_machine()
    budget = Budget.from_user(options.memory, machine)
    policy = options.policy(spec)
    if isinstance(spec, OnnxSpec):
        return _plan_onnx(spec, options, policy, machine, budget)
    if options.provider != CPU:
        raise BadOption(
            f"provider is {options.provider!r}, which is for ONNX models, and {spec.name} is none: leave "
            "it out; --gpu-layers is what puts a GGUF model on a GPU"
        )
    gpu = options.gpu_budget(
        policy
    )  # before the host is measured: drivers take memory of their own
    choice = SpeculationArg.parse(options.speculate)
    speculation = choice.wish(spec, offline=options.offline)
    with measured_baseline(spec, budget) as (baseline, sizes):
        if gpu is not None and gpu.holds_cache:
            baseline = replace(baseline, kv_on_demand=False)
        chosen = options.plan_request(policy, gpu, speculation)
        plan = plan_memory(spec, chosen, budget, baseline, sizes)
    return ResolvedModel(
        spec=spec,
        machine=machine,
        plan=plan,
        options=options,
        policy=policy,
        baseline=baseline,
        sizes=sizes,
        gpu=gpu,
        speculation=speculation,
    )


def _plan_onnx(
    spec: OnnxSpec, options: LoadConfig, policy: AttentionPolicy, machine: Machine, budget: Budget
) -> ResolvedModel:
    """Plan a graph that onnxruntime runs, with its own attention or with ours.

    Where products are packed, attention is always ours. Raises `BadOption` for what llama.cpp alone can do,
    and for what is to be ours where the graph keeps its own.
    """
    if options.repack and not policy.uses_native_kernels:
        policy = Dense()
    if policy.uses_native_kernels:
        spec = rewritten_spec(spec, policy, packed=options.repack)
    if options.gpu_budget(policy) is not None:
        raise BadOption(
            f"layers are to go to a GPU, and {spec.name} is an ONNX graph, which runs on the processor: "
            "leave gpu_layers and gpu_memory out"
        )
    is_rewritten = policy.uses_native_kernels and not isinstance(spec.swap, str)
    if provider_name(options.provider) != provider_name(CPU) and is_rewritten:
        wanted = "pack is wanted" if options.repack else f"attention is {policy.name!r}"
        raise BadOption(
            f"provider is {options.provider!r}, and {wanted}, which runs on the processor: leave one of "
            "them out"
        )
    sizes: ContextSizes = RewrittenSizes(spec) if is_rewritten else OnnxSizes(spec)
    speculation = SpeculationArg.parse(options.speculate).wish(spec, offline=options.offline)
    baseline = measured_onnx_baseline(spec, budget, is_rewritten=is_rewritten)
    chosen = options.plan_request(policy, speculation=speculation)
    return ResolvedModel(
        spec=spec,
        machine=machine,
        plan=plan_memory(spec, chosen, budget, baseline, sizes),
        options=options,
        policy=policy,
        baseline=baseline,
        sizes=sizes,
        speculation=speculation,
    )
