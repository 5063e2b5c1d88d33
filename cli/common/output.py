"""Plans and statistics as one line for people, and as a JSON object for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.common.streams import visible
from lowtide.memory.units import format_bytes

if TYPE_CHECKING:
    from lowtide import Runtime
    from lowtide.memory.plan.gpu import GpuPlan
    from lowtide.runtime.embedding.plan import PlannedEmbedding
    from lowtide.runtime.generation.statistics import Statistics
    from lowtide.runtime.options import SamplingParams
    from lowtide.runtime.planning.plan import ResolvedModel


ENDINGS = {
    "length": "stopped at --max-tokens",
    "context": "stopped because the context is full",
    "memory": "stopped because the memory budget is exhausted",
    None: "interrupted",
}
"""Finish reasons of answers that the model did not end itself."""


def plan_line(planned: ResolvedModel) -> str:
    """Return the plan in one line: model, context, planned peak, and what was reduced to fit; then its warnings."""
    plan = planned.plan
    line = (
        f"{planned.spec.name}, {planned.spec.quantisation} · context {plan.context:,} · planned "
        f"{format_bytes(plan.total_bytes)} of {format_bytes(plan.budget.num_bytes)} "
        f"({plan.budget.source})"
    )
    if planned.policy.uses_native_kernels:
        line += f" · attention {planned.policy}"
    if planned.options.repack is True:
        line += " · repacked weights"
    if planned.engine_kernels_reason is not None:
        what = "attention" if planned.options.repack is True else "matmuls"
        both = not planned.policy.uses_native_kernels and planned.options.repack is not True
        what = "kernels" if both else what
        line += f" · {planned.spec.engine}'s own {what}, because {planned.engine_kernels_reason}"
    if planned.quality is not None:
        line += f" · {planned.quality.sentence}"
    line += "".join(f" · {gpu_line(gpu)}" for gpu in plan.gpus)
    line += "".join(f" · reduced to fit: {step}" for step in plan.downgrades)
    return "\n".join([line, *(f"Warning: {warning}" for warning in planned.spec.warnings)])


def gpu_line(gpu: GpuPlan) -> str:
    """Return the plan of a GPU in a few words."""
    return (
        f"{gpu.num_layers} layers on {gpu.device.name}, planned {format_bytes(gpu.total_bytes)} of "
        f"{format_bytes(gpu.budget_bytes)}"
    )


def statistics_line(
    stats: Statistics, finish_reason: str | None, params: SamplingParams | None = None
) -> str:
    """Return the statistics of an answer in one line, with everything that is unusual.

    With `params`, also the seed that was drawn, which makes the answer repeatable.
    """
    parts = [f"{stats.generated_tokens} tokens"]
    if stats.decode_tokens_per_s is not None:
        parts.append(f"{stats.decode_tokens_per_s:.1f} tokens/s")
    if stats.time_to_first_token_s is not None:
        parts.append(f"first token after {stats.time_to_first_token_s:.2f} s")
    reused = f"{stats.reused_tokens} reused"
    if stats.restored_tokens:
        reused += " (from the prefix cache)"
    filtered = stats.retained_tokens < stats.prompt_tokens - stats.dropped_tokens
    retained = f" ({stats.retained_tokens} retained)" if filtered else ""
    parts.append(f"prompt {stats.prompt_tokens}{retained}, {reused}")
    if params is not None and params.draws_seed:
        parts.append(f"seed {stats.seed}")
    if stats.kernels is not None:
        parts.append(_kernels(stats.kernels))
    parts += _unusual(stats)
    if finish_reason in ENDINGS:
        parts.append(ENDINGS[finish_reason])
    if stats.peak_rss_bytes is not None:
        budget = format_bytes(stats.budget_bytes)
        parts.append(f"peak {format_bytes(stats.peak_rss_bytes)} of {budget}")
    return " · ".join(parts)


def _kernels(kernels: dict[str, str]) -> str:
    """Return who computed attention and matmuls in a few words."""
    makers = [kernels[part].partition(",")[0] for part in ("attention", "matmuls")]
    if makers[0] == makers[1]:
        return f"{makers[0]}'s kernels"
    return f"{makers[0]}'s attention, {makers[1]}'s matmuls"


def _unusual(stats: Statistics) -> list[str]:
    parts = []
    if stats.attended_share is not None and stats.attended_share < 1:
        parts.append(f"attended to {stats.attended_share:.0%} of the KV cache")
    if stats.scores is not None:
        parts.append(f"{stats.scores['skipped']:.0%} of score multiplications skipped")
    if stats.speculation is not None:
        parts.append(_speculation(stats.speculation))
    if stats.layers_native and stats.layers_native < stats.layers:
        parts.append(f"lowtide's attention in {stats.layers_native} of {stats.layers} layers")
    if stats.not_repacked_reason is not None:
        parts.append(f"weights not repacked: {stats.not_repacked_reason}")
    if stats.dropped_tokens:
        parts.append(f"{stats.dropped_tokens} oldest tokens dropped")
    freed = [f"freed {format_bytes(t.freed_bytes)} ({t.level})" for t in stats.trims]
    return [*parts, *freed]


def _speculation(values: dict[str, Any]) -> str:
    """Return how many drafts were accepted, or why none were verified, and a warning if answers may differ."""
    if values["off_reason"] is not None:
        return f"no speculation: {values['off_reason']}"
    line = f"{values['accepted']} of {values['drafted']} draft tokens accepted"
    if values["nondeterminism"] is not None:
        line += f" (the answer may differ from one without drafts: {values['nondeterminism']})"
    return line


def quality_note(planned: ResolvedModel, stats: Statistics, *, is_question: bool = False) -> None:
    """Say once a model, after a long exact answer, what the quality "fast" would save.

    `is_question` says whether the same command would know that its prompt is a question.
    """
    from lowtide.runtime.planning.quality import saving

    sentence = saving(planned, stats.prompt_tokens, stats.generated_tokens, is_question=is_question)
    if sentence is not None:
        note(sentence)


def template_note(runtime: Runtime) -> None:
    """Say on stderr where a chat template is that of the model's family."""
    if runtime.template_family is not None:
        note(
            f"{runtime.spec.name} has no chat template of its own: using that of {runtime.template_family}."
        )


def kernel_values(planned: ResolvedModel) -> dict[str, Any]:
    """Return for JSON which kernels run, why not lowtide's, and what the quality took."""
    return {
        "kernels": planned.kernels,
        "engine_kernels_reason": planned.engine_kernels_reason,
        "quality": None if planned.quality is None else planned.quality.to_dict(),
    }


def note(text: str) -> None:
    """Print a line that is not part of an answer: dim, on stderr."""
    click.secho(visible(text), dim=True, err=True)


def json_object(planned: ResolvedModel | PlannedEmbedding, **values: Any) -> str:
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
