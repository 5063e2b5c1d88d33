"""`lowtide bench`: speed and memory of attention policies, or of drafts, against a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.common.enforce import clean_termination
from lowtide.cli.common.options import (
    json_option,
    opening_options_but_attention,
    plan_with,
    take_open_options,
    take_spec,
    take_template_arguments,
    template_options,
)

if TYPE_CHECKING:
    from lowtide.models.spec import ModelSpec
    from lowtide.runtime.benchmark.paired import BenchmarkCase
    from lowtide.runtime.benchmark.tasks import Task

DEFAULT_DEPTHS = (512, 4096)
DEFAULT_ATTENTIONS = ("dense", "tidal")
DEFAULT_ANSWER_CONTEXT = 2048
PROMPTS_PER_KIND = 2


@click.command("bench", short_help="Measure speed and memory against a baseline.")
@opening_options_but_attention
@click.option(
    "--attention",
    "attentions",
    multiple=True,
    default=DEFAULT_ATTENTIONS,
    show_default=True,
    metavar="POLICY",
    help="An attention policy to measure; repeatable. With --speculate, the policy of all answers.",
)
@click.option(
    "-d",
    "--depth",
    "depths",
    multiple=True,
    type=click.IntRange(min=16),
    help="Number of tokens in the KV cache; repeatable.  [default: 512 and 4,096]",
)
@click.option(
    "--speculate",
    "speculations",
    multiple=True,
    metavar="DRAFT",
    help="Measure answers with this draft instead, by kind of prompt; repeatable.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --speculate: read prompts from FILE, one JSON object per line with category and turns. The "
    f"first {PROMPTS_PER_KIND} of each category are used.",
)
@click.option(
    "--schemas",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Measure structured output instead: answer each JSON schema in FILE, one JSON object per line with schema, "
    "and id and prompt where it has them.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 100),
    default=5,
    show_default=True,
    help="How often everything is measured.",
)
@click.option(
    "-n",
    "--tokens",
    type=click.IntRange(1, 1024),
    default=32,
    show_default=True,
    help="Number of tokens to decode in each round; with --schemas, the most tokens of an answer.",
)
@template_options
@json_option
@click.option(
    "--enforce",
    is_flag=True,
    help="Let the kernel enforce the budget of each process, and kill a process that exceeds it (Linux "
    "with control groups).",
)
def command(
    attentions: tuple[str, ...],
    depths: tuple[int, ...],
    speculations: tuple[str, ...],
    prompts: Path | None,
    schemas: Path | None,
    rounds: int,
    tokens: int,
    as_json: bool,
    enforce: bool,
    **options: Any,
) -> None:
    """Compare attention policies with the engine's own attention at each depth.

    The baseline is plain llama.cpp on the same file or, for an ONNX model, onnxruntime on the unchanged
    graph. Each configuration runs in a process of its own, and the processes take turns. Ratios are medians
    over the rounds; above 1 means faster than the baseline. Run it on an idle machine.

    With --speculate, compare greedy answers with drafts to answers without, for several kinds of prompts.

    With --schemas, compare structured output with free decoding, llama-cpp-python's grammars, and outlines-core and
    xgrammar where they are installed: how many schemas each engine takes, how many of its answers follow them, and
    how long tokens take.
    """
    from lowtide.cli.common.output import json_object, note
    from lowtide.runtime.benchmark.paired import PairedBenchmark
    from lowtide.runtime.benchmark.tasks import (
        attention_workers,
        speculation_workers,
        worker_options,
    )

    if schemas is not None and (depths or speculations):
        raise click.UsageError(
            "--schemas excludes --depth and --speculate: it measures greedy answers without drafts"
        )
    if speculations and depths:
        raise click.UsageError(
            "--depth and --speculate exclude each other: answers fill the KV cache by themselves"
        )
    if prompts is not None and not speculations:
        raise click.UsageError("--prompts needs --speculate: name a draft, or leave --prompts out")
    arguments = take_template_arguments(options)
    if (arguments or options["chat_template"]) and not speculations and schemas is None:
        raise click.UsageError(
            "--chat-template and --template-arg need --speculate or --schemas: without them, prompts are random "
            "tokens"
        )
    if (speculations or schemas) and attentions == DEFAULT_ATTENTIONS:
        attentions = ("dense",)
    spec = take_spec(options)
    if schemas is not None:
        from lowtide.cli.common.schema_bench import measure_schemas

        measure_schemas(
            spec,
            schemas,
            attentions[0],
            tokens,
            arguments,
            options,
            as_json=as_json,
            enforce=enforce,
        )
        return
    tasks = (
        _answer_tasks(attentions, prompts, tokens, arguments)
        if speculations
        else _depth_tasks(spec, attentions, depths, tokens)
    )
    options["attention"] = attentions[0]
    if speculations:
        options["speculate"] = speculations[0]
        context = min(DEFAULT_ANSWER_CONTEXT, spec.context_length)
    else:
        context = max(task.to_dict()["depth"] for task in tasks) + tokens + 1
    options["context"] = options["context"] or context
    options["expected_tokens"] = context
    planned = plan_with(spec, take_open_options(options))
    planned.require_fit()
    config = worker_options(planned)
    workers = (
        speculation_workers(attentions[0], speculations, config)
        if speculations
        else attention_workers(spec, attentions, config)
    )
    with clean_termination(), PairedBenchmark(spec, workers, tasks, enforced=enforce) as benchmark:
        cases = benchmark.run(rounds=rounds, progress=note)
    if as_json:
        click.echo(json_object(planned, cases=[case.to_dict() for case in cases]))
    else:
        _print_table(workers[0].name, cases)


def _depth_tasks(
    spec: ModelSpec, attentions: Sequence[str], depths: Sequence[int], tokens: int
) -> Sequence[Task]:
    from lowtide.attention.registry import parse_policy
    from lowtide.models.errors import BadOption
    from lowtide.runtime.benchmark.tasks import DepthTask

    for attention in attentions:
        policy = parse_policy(attention).resolve(spec)
        if policy.prompt_selector is not None:
            raise BadOption(
                f"attention {policy.name} filters prompts, but bench fills the KV cache itself: name dense or "
                "tidal"
            )
    defaults = [depth for depth in DEFAULT_DEPTHS if depth < spec.context_length - tokens]
    return [DepthTask(depth, tokens) for depth in sorted(set(depths or defaults))]


def _answer_tasks(
    attentions: Sequence[str], prompts: Path | None, tokens: int, arguments: Mapping[str, Any]
) -> Sequence[Task]:
    from lowtide.models.errors import BadOption
    from lowtide.runtime.benchmark.tasks import BUILT_IN_PROMPTS, AnswerTask, read_prompts

    if len(attentions) > 1:
        raise BadOption(
            "--speculate measures answers with one attention policy, but several are named: name one"
        )
    kinds = BUILT_IN_PROMPTS if prompts is None else read_prompts(prompts, PROMPTS_PER_KIND)
    return [AnswerTask(kind, tuple(texts), tokens, arguments) for kind, texts in kinds.items()]


def _print_table(baseline: str, cases: Sequence[BenchmarkCase]) -> None:
    """Print the cases, with a line of the baseline before those of each task."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    has_prefill = any(case.prefill is not None for case in cases)
    has_drafts = any(case.drafts is not None for case in cases)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Kind" if has_drafts else "Depth", no_wrap=True)
    table.add_column("Draft" if has_drafts else "Attention", no_wrap=True)
    headings = ["Decode\ntokens/s", "Ratio"]
    headings += ["Prefill\ntokens/s", "Ratio"] if has_prefill else []
    headings += ["Accepted\ndrafts", "Same\nanswers"] if has_drafts else []
    for heading in (*headings, "Peak\nmemory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for task in dict.fromkeys(case.task for case in cases):
        of_task = [case for case in cases if case.task == task]
        table.add_row(task.label, baseline, *_baseline_cells(of_task[0]))
        for case in of_task:
            table.add_row(task.label, case.name, *_cells(case), end_section=case is of_task[-1])
    console = Console()
    console.print(table)
    for note in dict.fromkeys(_notes(cases)):
        console.print(note, highlight=False)
    console.print(
        f"{baseline} is the baseline: {cases[0].peer}. A ratio above 1 means faster than the baseline.",
        highlight=False,
    )


def _baseline_cells(case: BenchmarkCase) -> list[str]:
    from lowtide.memory.units import format_bytes

    cells = [f"{case.decode.peer_tokens_per_s:.1f}", ""]
    cells += [f"{case.prefill.peer_tokens_per_s:.0f}", ""] if case.prefill is not None else []
    cells += ["", ""] if case.drafts is not None else []
    return [*cells, format_bytes(case.peer_peak_rss_bytes)]


def _cells(case: BenchmarkCase) -> list[str]:
    from lowtide.memory.units import format_bytes

    cells = [f"{case.decode.tokens_per_s:.1f}", f"{case.decode.ratio:.2f}"]
    if case.prefill is not None:
        cells += [f"{case.prefill.tokens_per_s:.0f}", f"{case.prefill.ratio:.2f}"]
    if case.drafts is not None:
        accepted = f"{case.drafts.accepted} of {case.drafts.drafted}"
        cells += [accepted, "yes" if case.drafts.same else "no"]
    return [*cells, format_bytes(case.peak_rss_bytes)]


def _notes(cases: Sequence[BenchmarkCase]) -> list[str]:
    """Return what a policy's name meant for this model, and why drafts were not verified."""
    notes = [
        f"{case.name}: {case.policy}"
        for case in cases
        if case.drafts is None and case.policy != case.name
    ]
    for case in cases:
        if case.drafts is not None and case.drafts.off_reason is not None:
            notes.append(f"{case.task.label}, {case.name}: {case.drafts.off_reason}")
    return notes
