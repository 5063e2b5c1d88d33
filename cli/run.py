"""`lowtide run`: one answer on stdout, everything else on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.enforce import enforce_option, hold
from lowtide.cli.options import (
    generation_options,
    opening_options,
    planned_model,
    speculate_option,
    take_generation_options,
)

if TYPE_CHECKING:
    from lowtide import GenerationChunk, Runtime
    from lowtide.memory.os.cgroup import ControlGroup
    from lowtide.runtime.options import SamplingParams


@click.command("run")
@opening_options
@speculate_option
@click.option("-p", "--prompt", help="The prompt.  [default: standard input]")
@click.option("-f", "--file", type=click.Path(path_type=Path), help="Read the prompt from a file.")
@click.option("-s", "--system", help="A system message before the prompt.")
@click.option(
    "--raw", is_flag=True, help="Continue the text as it stands, without a chat template."
)
@click.option("--explain", is_flag=True, help="Show what --attention gem kept of the prompt.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@enforce_option
@generation_options
def command(
    prompt: str | None,
    file: Path | None,
    system: str | None,
    raw: bool,
    explain: bool,
    as_json: bool,
    enforce: ControlGroup | None,
    **options: Any,
) -> None:
    """Answer one prompt: the answer goes to stdout, everything else to stderr.

    MODEL is a .gguf file, an ONNX folder, a name from `lowtide models`, or hf:user/repo[:quant].
    """
    from lowtide import GenerationResult, Runtime
    from lowtide.cli.input import prompt_text
    from lowtide.cli.output import json_object, note, plan_line, statistics_line
    from lowtide.memory.plan.estimates import prompt_limit_bytes

    if system is not None and raw:
        raise click.UsageError("--system needs a chat template, --raw goes without: drop one")
    generation = take_generation_options(options)
    planned = planned_model(options)
    if explain and planned.policy.prompt_selector is None:
        raise click.UsageError("--explain shows what --attention gem kept of a prompt: add it")
    planned.require_fit()
    text = prompt_text(prompt, file, prompt_limit_bytes(planned.plan.kv_tokens))
    note(plan_line(planned))
    hold(enforce, planned.plan.budget)
    with Runtime.load(planned) as runtime:
        pieces = _answer(runtime, text, system, raw, generation)
        result = GenerationResult.of(pieces if as_json else _shown(pieces))
        kept = runtime.retained_spans() if explain else None
    if as_json:
        click.echo(
            json_object(
                planned,
                text=result.text,
                tokens=list(result.token_ids),
                finish_reason=result.finish_reason,
                stats=result.stats.to_dict(),
                **({} if kept is None else {"kept": [passage.to_dict() for passage in kept]}),
            )
        )
        return
    click.echo()
    for passage in kept or ():
        note(f"{passage.position:>7,}  {passage.score:.3f}  {passage.text!r}")
    note(statistics_line(result.stats, result.finish_reason))


def _answer(
    runtime: Runtime, text: str, system: str | None, raw: bool, generation: SamplingParams
) -> Iterator[GenerationChunk]:
    if raw:
        return runtime.stream(text, options=generation)
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return runtime.chat(messages, options=generation)


def _shown(pieces: Iterator[GenerationChunk]) -> Iterator[GenerationChunk]:
    for piece in pieces:
        if piece.text:
            click.echo(piece.text, nl=False)
        yield piece
