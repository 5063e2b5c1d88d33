"""LoadConfig: what to load and how much memory it may take, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lowtide.attention.dense import Dense, Llama
from lowtide.attention.policy import AttentionPolicy
from lowtide.attention.registry import parse_policy
from lowtide.memory.machine import usable_cores
from lowtide.memory.plan.attention import AttentionMemory
from lowtide.memory.plan.batch import MAX_SEQUENCES
from lowtide.memory.plan.gpu import GpuBudget, parse_gpu_layers
from lowtide.memory.plan.plan import PlanRequest
from lowtide.memory.plan.speculation.choices import SpeculationConfig
from lowtide.memory.units import BadSize, checked_size, parse_size
from lowtide.models.arguments.names import option
from lowtide.models.arguments.values import MOST, as_whole, choice, flag, shown, text, whole_number
from lowtide.models.chat_template import template_source
from lowtide.models.errors import BadOption
from lowtide.models.gguf.gpu import require_gpus
from lowtide.models.onnx.config import CPU
from lowtide.models.spec import ModelSpec
from lowtide.runtime.backends.kernels.kernel_choice import NO_KERNELS, KernelChoice
from lowtide.runtime.speculation.options import SpeculationArg

AUTO = "auto"
EXACT, HIGH, FAST = QUALITIES = ("exact", "high", "fast")
MAX_THREADS = 512
_COUNTS = ("expected_tokens", "rules_bytes", "server_bytes", "sequences", "max_waiting")
INTERNAL_FIELDS = ("compared_tokens", "attention_memory", "profiled")
"""Set by evaluations and the profiler, not by users."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """What to load and how much memory it may take.

    `memory` is a size ("1GiB", "50%"), `context` a number of tokens, `kv_type` one of f16, q8_0 and q4_0; None
    leaves the choice to the plan. `threads` None or "auto" means the cores that this process may use, by
    affinity and by the CPU quota of its container, and fewer in passes while others use them. In the `background`,
    passes have the lowest priority and leave a core to others.

    `expected_tokens` are those of the longest prompt with its answer, where they are known: the plan makes room for
    them before anything else. 0 means unknown.

    `attention` is a policy or its name: "auto" ("dense" where it works and is not slower, else "llama"), "llama"
    (the engine's own kernels), "dense" (lowtide's kernels: exact, and a token's result does not depend on the
    batch or the threads), or an approximation: "tidal" (`Tidal`: top-k keys, "tidal:k=512"), "delta" (`Delta`:
    similar keys share a score) or "gem" (`Gem`: prompts are filtered).

    `gpu_layers` is how many layers go to the GPUs, counted as llama.cpp does, or "auto": as many as fit into
    `gpu_memory`, a size on each device (None: what is free). Both None use no GPU.
    `prefix_cache` is a size ("64MiB") for KV snapshots of earlier prompts; 0 keeps none.
    `repack` runs matmuls with lowtide's kernels, from a repacked copy of the weights in the cache folder,
    which is made on first use; an ONNX graph then runs with "dense" attention instead of its own. "auto" is True
    where the kernels know the weights and are not slower, and the budget has room for what they need.
    `reference` is attention "llama" without `repack`: the engine's own kernels, token for token.
    `speculate` is "off", "ngram", "trigram", "auto" or a draft model, each with ":draft=N" for the most draft
    tokens of a pass. `provider` is the short name of an
    execution provider for ONNX models. `chat_template` replaces the model's own: the text of a template, or the
    `Path` of a file with one. `structured` reserves the memory of structured output, so that a constraint
    cannot be refused for want of room; `rules_bytes` that of its tables (`num_bytes` of `Avoid` and its like), and
    `server_bytes` that of a server around the runtime.

    `quality` "high" and "fast" take the calibrated policy with the shortest predicted time whose measured distance from
    exact answers is inside a limit (`runtime/planning/quality.py`), "exact" takes none.

    `sequences` answers run together, in one KV cache that is planned for them; more of them wait, up to `max_waiting`.

    `compared_tokens` is how many distributions over the vocabulary a measurement keeps, `attention_memory`
    the memory of attention if that is not the policy's own, `profiled` whether a profiler observes.

    Raises `BadOption` or `BadSize` for values that cannot be.
    """

    memory: str | int | None = None
    context: int | None = None
    kv_type: str | None = None
    batch_size: int | None = None
    expected_tokens: int = 0
    threads: int | str | None = None
    attention: str | AttentionPolicy = AUTO
    gpu_layers: int | str | None = None
    gpu_memory: str | int | None = None
    offline: bool = False
    compared_tokens: int = 0
    profiled: bool = False
    attention_memory: AttentionMemory | None = None
    prefix_cache: str | int = 0
    repack: bool | str = AUTO
    reference: bool = False
    speculate: str = "off"
    provider: str = CPU
    chat_template: str | Path | None = None
    structured: bool = False
    rules_bytes: int = 0
    server_bytes: int = 0
    quality: str = EXACT
    background: bool = False
    sequences: int = 1
    max_waiting: int = 64

    def __post_init__(self) -> None:
        for name, value in {**self._numbers(), **self._sizes(), **self._choices()}.items():
            object.__setattr__(self, name, value)
        if self.reference:
            self._choose_reference()
        if self.quality != EXACT and self.attention != AUTO:
            set_already = option("reference", True) if self.reference else option("attention")
            raise BadOption(
                f"{option('quality', self.quality)} chooses the attention policy, but {set_already} is set: leave one "
                "of them out"
            )
        gpu_memory, gpu_layers = option("gpu_memory"), option("gpu_layers")
        if parse_gpu_layers(self.gpu_layers) == 0 and self.gpu_memory is not None:
            raise BadOption(
                f"{gpu_memory} is set, but {gpu_layers} is 0: leave {gpu_memory} out, or raise {gpu_layers}"
            )
        if self.repack is True and self.uses_gpu:
            raise BadOption(
                f"{option('repack')} is for matmuls on the CPU, but {gpu_layers} or {gpu_memory} is set: leave "
                "one of them out"
            )

    def _choose_reference(self) -> None:
        """Set attention and repack to what `reference` means; raise `BadOption` where they say otherwise."""
        reference = option("reference", True)
        if not isinstance(self.attention, str) or self.attention not in (AUTO, Llama.name):
            raise BadOption(
                f"{reference} runs the engine's own attention, but {option('attention')} is "
                f"{shown(self.attention)}: leave one of them out"
            )
        if self.repack is True:
            raise BadOption(
                f"{reference} runs the engine's own matmuls, but {option('repack')} is set: leave one of them out"
            )
        object.__setattr__(self, "attention", Llama.name)
        object.__setattr__(self, "repack", False)

    def _numbers(self) -> dict[str, int | None]:
        """Return the checked counts; raise `BadOption` for what is none."""
        if isinstance(self.threads, str) and self.threads == AUTO:
            object.__setattr__(self, "threads", None)
        ranges = (
            ("context", 1, MOST),
            ("batch_size", 1, MOST),
            ("expected_tokens", 0, MOST),
            ("rules_bytes", 0, MOST),
            ("server_bytes", 0, MOST),
            ("threads", 1, MAX_THREADS),
            ("sequences", 1, MAX_SEQUENCES),
            ("max_waiting", 0, MOST),
        )
        numbers = {
            name: None
            if (value := getattr(self, name)) is None
            else whole_number(option(name), value, least, most)
            for name, least, most in ranges
        }
        defaults: dict[str, Any] = {field.name: field.default for field in fields(self)}
        return {
            **numbers,
            **{name: defaults[name] for name in _COUNTS if numbers[name] is None},
        }

    def _sizes(self) -> dict[str, str | int | None]:
        """Return the checked sizes; raise `BadSize` for what is none."""
        cached = self.prefix_cache
        no_cache = cached is None or as_whole(cached) == 0
        return {
            **{
                name: None
                if (value := getattr(self, name)) is None
                else checked_size(option(name), value)
                for name in ("memory", "gpu_memory")
            },
            "prefix_cache": 0 if no_cache else _cache_size(cached),
        }

    def _choices(self) -> dict[str, Any]:
        """Return the other checked options, with None as the default; raise `BadOption` for a wrong value."""
        defaults: dict[str, Any] = {field.name: field.default for field in fields(self)}
        names = (
            "attention",
            "speculate",
            "provider",
            "offline",
            "repack",
            "reference",
            "quality",
            "kv_type",
            "gpu_layers",
            "structured",
            "background",
        )
        values = {
            name: defaults[name] if getattr(self, name) is None else getattr(self, name)
            for name in names
        }
        values["quality"] = choice(option("quality"), values["quality"], QUALITIES)
        values["chat_template"] = _chat_template(self.chat_template)
        if not _is_auto(values["attention"]):
            parse_policy(values["attention"])
        values["speculate"] = SpeculationArg.text(values["speculate"])
        SpeculationArg.parse(values["speculate"])
        parse_gpu_layers(values["gpu_layers"])
        for name in ("offline", "reference", "structured", "background"):
            values[name] = flag(option(name), values[name])
        if not _is_auto(values["repack"]):
            values["repack"] = flag(option("repack"), values["repack"])
        for name in ("provider", "kv_type"):
            if values[name] is not None:
                values[name] = text(option(name), values[name])
        return values

    @classmethod
    def of(cls, **options: Any) -> LoadConfig:
        """Return the config with these fields; raise `BadOption` for a name that is not one of them."""
        names = [field.name for field in fields(cls) if field.name not in INTERNAL_FIELDS]
        unknown = sorted(set(options) - set(names))
        if unknown:
            raise BadOption(
                f"unknown option {shown(unknown[0])}; the options are {', '.join(names)}"
            )
        return cls(**options)

    def with_kernels(self, choice: KernelChoice) -> LoadConfig:
        """Return the config with a policy and a bool in place of "auto"."""
        policy = Dense.name if choice.attention else Llama.name
        return replace(
            self,
            attention=policy if self.attention == AUTO else self.attention,
            repack=choice.repack if self.repack == AUTO else self.repack,
        )

    def left_open(self, choice: KernelChoice) -> KernelChoice:
        """Return which of the kernels in `choice` run only because they are the default."""
        return KernelChoice(
            attention=choice.attention and self.attention == AUTO,
            repack=choice.repack and self.repack == AUTO,
        )

    def reason_for_engine(self, choice: KernelChoice) -> str | None:
        """Return why the engine's own kernels compute what is "auto" here; None where nothing is, or they do not."""
        by_engine = (self.attention == AUTO and not choice.attention) or (
            self.repack == AUTO and not choice.repack
        )
        return choice.reason if by_engine else None

    def policy(self, spec: ModelSpec) -> AttentionPolicy:
        """Return the attention policy, resolved for the model; raise `BadOption` where it does not fit."""
        return parse_policy(self.attention).resolve(spec)

    def gpu_budget(self, policy: AttentionPolicy) -> GpuBudget | None:
        """Return what the devices may take; None where no GPU is used.

        Lowtide's own attention runs on the CPU: its KV cache stays there. Raises `NoGpu` where llama.cpp has
        no device.
        """
        if not self.uses_gpu:
            return None
        if policy.prompt_selector is not None:
            raise BadOption(
                f"{option('attention', policy.name)} filters prompts with the first layers alone, which does not work "
                "with layers on a GPU: leave one of them out"
            )
        devices = require_gpus(
            option("gpu_memory") if self.gpu_layers is None else option("gpu_layers")
        )
        layers = parse_gpu_layers(self.gpu_layers)
        return GpuBudget.from_user(
            layers, self.gpu_memory, devices, holds_cache=not policy.uses_native_kernels
        )

    def plan_request(
        self,
        policy: AttentionPolicy,
        gpu: GpuBudget | None = None,
        speculation: SpeculationConfig | None = None,
        prompt_tokens: int = 0,
        optional: KernelChoice = NO_KERNELS,
    ) -> PlanRequest:
        """Return what the memory plan needs to know of these options, which leave nothing to "auto".

        `prompt_tokens` are those of a prompt that is held already, with its answer. The plan may leave out the
        kernels in `optional`.
        """
        return PlanRequest(
            context=self.context,
            structured=self.structured,
            rules_bytes=self.rules_bytes,
            server_bytes=self.server_bytes,
            sequences=self.sequences,
            kv_type=self.kv_type,
            batch_size=self.batch_size,
            expected_tokens=max(self.expected_tokens, prompt_tokens),
            threads=self.num_threads,
            attention_threads=self.num_threads
            if policy.uses_native_kernels and not optional.attention
            else 0,
            attention=self.attention_memory or policy.memory,
            compared_tokens=self.compared_tokens,
            profiled=self.profiled,
            prefix_bytes=self.prefix_bytes,
            repacked=self.repack is True and not optional.repack,
            optional_attention=optional.attention,
            optional_repack=optional.repack,
            gpu=gpu,
            speculation=speculation,
        )

    @property
    def uses_gpu(self) -> bool:
        """Whether layers may go to a GPU."""
        no_layers = parse_gpu_layers(self.gpu_layers) == 0
        return not no_layers and (self.gpu_layers is not None or self.gpu_memory is not None)

    @property
    def prefix_bytes(self) -> int:
        """The most that the prefix cache may hold."""
        return 0 if self.prefix_cache == 0 else parse_size(self.prefix_cache)

    @property
    def num_threads(self) -> int:
        """The number of threads to compute with, at most."""
        if self.threads is not None:
            return int(self.threads)
        return max(usable_cores() - self.background, 1)


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == AUTO


def _chat_template(value: Any) -> str | None:
    """Return the source of the caller's chat template; raises `BadOption` where there is none."""
    if value is None:
        return None
    if not isinstance(value, (str, Path)):
        raise BadOption(
            f"{option('chat_template')} is {shown(value)}: pass the text of a template, or the Path of a file"
        )
    return template_source(value)


def _cache_size(value: Any) -> str | int:
    """Return the size of the prefix cache; raises `BadSize` for a share, which it cannot be, or no size."""
    try:
        size = checked_size(option("prefix_cache"), value)
        parse_size(size)
    except BadSize:
        raise BadSize(
            f"{option('prefix_cache')} is {shown(value)}, which is not a size: write one such as 64MiB, or 0 "
            "for none"
        ) from None
    return size
