"""What a person sees of plans and statistics in one line, and what a program sees in JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from lowtide.memory.units import format_bytes

if TYPE_CHECKING:
    from lowtide.memory.plan.gpu import GpuPlan
    from lowtide.runtime.generation.statistics import Statistics
    from lowtide.runtime.planning.plan import ResolvedModel


ENDINGS = {
    "length": "cut at --max-tokens",
    "context": "the context is full",
    "memory": "ended here: the memory budget is reached",
    None: "stopped",
}
"""What is said of an answer that the model did not end itself."""


def plan_line(planned: ResolvedModel) -> str:
    """Return the plan in a line: model, context, planned peak, what was given up."""
    plan = planned.plan
    line = (
        f"{planned.spec.name}, {planned.spec.quantisation} · context {plan.context:,} · planned "
        f"{format_bytes(plan.total_bytes)} of {format_bytes(plan.budget.num_bytes)} "
        f"({plan.budget.source})"
    )
    if planned.policy.uses_native_kernels:
        line += f" · attention {planned.policy}"
    if planned.options.repack:
        line += " · packed weights"
    line += "".join(f" · {gpu_line(gpu)}" for gpu in plan.gpus)
    return line + "".join(f" · gave up {step}" for step in plan.downgrades)


def gpu_line(gpu: GpuPlan) -> str:
    """Return a device's part of the plan in a few words."""
    return (
        f"{gpu.num_layers} layers on {gpu.device.name}, planned {format_bytes(gpu.total_bytes)} of "
        f"{format_bytes(gpu.budget_bytes)}"
    )


def statistics_line(stats: Statistics, finish_reason: str | None) -> str:
    """Return an answer's cost in a line; whatever is out of the ordinary is said."""
    parts = [f"{stats.generated_tokens} tokens"]
    if stats.decode_tokens_per_s is not None:
        parts.append(f"{stats.decode_tokens_per_s:.1f} tokens/s")
    if stats.time_to_first_token_s is not None:
        parts.append(f"first after {stats.time_to_first_token_s:.2f} s")
    reused = f"{stats.reused_tokens} reused"
    if stats.restored_tokens:
        reused += " (from the prefix cache)"
    filtered = stats.retained_tokens < stats.prompt_tokens - stats.dropped_tokens
    kept = f" ({stats.retained_tokens} kept)" if filtered else ""
    parts.append(f"prompt {stats.prompt_tokens}{kept}, {reused}")
    parts += _out_of_the_ordinary(stats)
    if finish_reason in ENDINGS:
        parts.append(ENDINGS[finish_reason])
    if stats.peak_rss_bytes is not None:
        budget = format_bytes(stats.budget_bytes)
        parts.append(f"peak {format_bytes(stats.peak_rss_bytes)} of {budget}")
    return " · ".join(parts)


def _out_of_the_ordinary(stats: Statistics) -> list[str]:
    parts = []
    if stats.attended_share is not None and stats.attended_share < 1:
        parts.append(f"{stats.attended_share:.0%} of the cache attended to")
    if stats.scores is not None:
        parts.append(f"{stats.scores['skipped']:.0%} of score multiplications skipped")
    if stats.speculation is not None:
        parts.append(_speculation(stats.speculation))
    if stats.layers_native and stats.layers_native < stats.layers:
        parts.append(f"our attention in {stats.layers_native} of {stats.layers} layers")
    if stats.not_repacked_reason is not None:
        parts.append(f"weights not packed: {stats.not_repacked_reason}")
    if stats.dropped_tokens:
        parts.append(f"{stats.dropped_tokens} oldest tokens dropped")
    trims = [f"gave {format_bytes(t.freed_bytes)} back ({t.level})" for t in stats.trims]
    return [*parts, *trims]


def _speculation(told: dict[str, Any]) -> str:
    """Say what drafts were worth, or why nothing was verified, and what is not promised."""
    if told["off_reason"] is not None:
        return f"no speculation: {told['off_reason']}"
    line = f"{told['accepted']} of {told['drafted']} drafted tokens accepted"
    if told["nondeterminism"] is not None:
        line += f" (perhaps not the plain loop's answer: {told['nondeterminism']})"
    return line


def note(text: str) -> None:
    """Print a line that is no answer: dim, on stderr."""
    click.secho(text, dim=True, err=True)


def json_object(planned: ResolvedModel, **values: Any) -> str:
    """Return the documented JSON object: version, model and machine, then `values`."""
    import lowtide

    spec = planned.spec
    model = {
        "name": spec.name,
        "path": str(spec.path),
        "architecture": spec.architecture,
        "quantisation": spec.quantisation,
        "layers": spec.num_layers,
        "context_length": spec.context_length,
        "weight_bytes": spec.weight_bytes,
        "file_bytes": spec.file_bytes,
    }
    common = {
        "version": lowtide.__version__,
        "model": model,
        "machine": planned.machine.to_dict(),
    }
    return json.dumps({**common, **values}, ensure_ascii=False, indent=2)
