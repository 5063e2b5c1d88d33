"""`lowtide run`: answers one prompt; the answer goes to stdout, everything else to stderr."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.common.answers import (
    MAX_ANSWERS,
    answers_of,
    answers_values,
    require_answers,
)
from lowtide.cli.common.enforce import enforce_option, set_limit
from lowtide.cli.common.options import (
    generation_options,
    json_option,
    opening_options,
    plan_with,
    quality_option,
    speculate_option,
    system_option,
    take_generation_options,
    take_open_options,
    take_spec,
    take_template_arguments,
    template_options,
)
from lowtide.cli.common.streams import print_answer
from lowtide.cli.common.structured import (
    reserve_constraint,
    structured_options,
    take_constraint,
)

if TYPE_CHECKING:
    from lowtide import GenerationResult
    from lowtide.memory.os.cgroup import ControlGroup


@click.command("run", short_help="Answer one prompt.")
@opening_options
@speculate_option
@quality_option
@click.option("-p", "--prompt", help="The prompt.  [default: read from standard input]")
@click.option(
    "-f",
    "--file",
    type=click.Path(path_type=Path),
    help="Read the prompt from this file; - is standard input.",
)
@system_option
@template_options
@click.option("--raw", is_flag=True, help="Continue the text as it is, without the chat template.")
@click.option(
    "--special",
    is_flag=True,
    help="With --raw: parse the control tokens that the text spells, such as <|im_start|>.",
)
@click.option(
    "--explain", is_flag=True, help="Show which parts of the prompt --attention gem retained."
)
@click.option(
    "--logprobs",
    type=int,
    metavar="N",
    help="With --json: the log probability of each token, and the N (0 to 20) most probable ones at its place.",
)
@click.option(
    "--answers",
    type=click.IntRange(1, MAX_ANSWERS),
    default=1,
    help="Draw so many answers; with --sampling asap each one is closer to the model's distribution, with awrs they "
    "are particles with weights.  [default: 1]",
)
@json_option
@enforce_option
@generation_options
@structured_options
def command(
    prompt: str | None,
    file: Path | None,
    system: str | None,
    raw: bool,
    special: bool,
    explain: bool,
    logprobs: int | None,
    answers: int,
    as_json: bool,
    enforce: ControlGroup | None,
    **options: Any,
) -> None:
    """Answer one prompt. The answer goes to stdout, everything else to stderr.

    MODEL is a .gguf file, an ONNX folder, a name from `lowtide models`, or hf:user/repo[:quant].
    """
    from lowtide.cli.common.input import prompt_text
    from lowtide.cli.common.output import (
        json_object,
        kernel_values,
        note,
        plan_line,
        quality_note,
        statistics_line,
        template_note,
    )
    from lowtide.cli.common.progress import load_runtime
    from lowtide.runtime.planning.expected import ExpectedPrompt, PromptLimit

    if system is not None and raw:
        raise click.UsageError(
            "--system needs the chat template, which --raw skips: leave one of them out"
        )
    if special and not raw:
        raise click.UsageError(
            "--special parses control tokens in a text without a chat template: add --raw, or leave it out"
        )
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs are part of the JSON: add --json, or leave it out")
    constraint = take_constraint(options)
    generation = replace(
        take_generation_options(options), special=special, constraint=constraint, logprobs=logprobs
    )
    reserve_constraint(options, generation)
    require_answers(answers, generation, raw=raw)
    arguments = take_template_arguments(options)
    if raw and (arguments or options["chat_template"]):
        raise click.UsageError(
            "--chat-template and --template-arg are for the chat template, which --raw skips: leave one of them out"
        )
    spec = take_spec(options)
    config = take_open_options(options)
    text = prompt_text(prompt, file, PromptLimit.of(spec, config))
    messages = [] if raw else _messages(text, system)
    expected = ExpectedPrompt(text=text, messages=messages, params=generation, arguments=arguments)
    planned = plan_with(spec, config, expected)
    if explain and planned.policy.prompt_selector is None:
        raise click.UsageError(
            "--explain shows what --attention gem retained of a prompt: add --attention gem"
        )
    planned.require_fit()
    note(plan_line(planned))
    set_limit(enforce, planned.plan.budget)
    with load_runtime(planned) as runtime:
        if not raw:
            template_note(runtime)
        elif not special and runtime.spells_control_tokens(text):
            note(
                "the prompt spells control tokens of the model, and they are read as text; --special parses them"
            )
        show = None if as_json else print_answer
        asked = text if raw else messages
        results = answers_of(runtime, asked, answers, generation, arguments, show)
        result = results[-1]
        spans = runtime.retained_spans() if explain else None
    if as_json:
        click.echo(
            json_object(
                planned,
                text=result.text,
                tokens=list(result.token_ids),
                finish_reason=result.finish_reason,
                stats=result.stats.to_dict(),
                **kernel_values(planned),
                **_logprobs(result),
                **_reasoning(result),
                **answers_values(results),
                **({} if spans is None else {"retained_spans": [span.to_dict() for span in spans]}),
            )
        )
        return
    click.echo()
    for span in spans or ():
        note(f"{span.position:>7,}  {span.score:.3f}  {span.text!r}")
    note(statistics_line(result.stats, result.finish_reason, generation))
    quality_note(planned, result.stats, is_question=not raw)


def _logprobs(result: GenerationResult) -> dict[str, Any]:
    if result.logprobs is None:
        return {}
    return {
        "logprobs": [
            {**one.to_dict(), "top_logprobs": [other.to_dict() for other in one.top]}
            for one in result.logprobs
        ]
    }


def _reasoning(result: GenerationResult) -> dict[str, Any]:
    return (
        {} if result.reasoning is None else {"reasoning": result.reasoning, "answer": result.answer}
    )


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": text}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]
