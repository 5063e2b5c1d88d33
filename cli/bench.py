"""`lowtide bench`: speed and memory by depth, each policy against the engine's own on the same model.

What `lowtide bench --speculate` measures, and its table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.enforce import tidy_termination
from lowtide.cli.options import (
    opening_options_but_attention,
    plan_with,
    take_open_options,
    take_spec,
)

if TYPE_CHECKING:
    from lowtide.runtime.benchmark.attention import BenchCase
    from lowtide.runtime.benchmark.speculation import SpeculationCase


DEFAULT_DEPTHS = (512, 4096)
DEFAULT_ATTENTIONS = ("dense", "tidal")


@click.command("bench")
@opening_options_but_attention
@click.option(
    "--attention",
    "attentions",
    multiple=True,
    default=DEFAULT_ATTENTIONS,
    show_default=True,
    metavar="POLICY",
    help="A policy to measure; repeatable.",
)
@click.option(
    "-d",
    "--depth",
    "depths",
    multiple=True,
    type=click.IntRange(min=16),
    help="Tokens in the cache; repeatable.  [default: 512 and 4,096]",
)
@click.option(
    "--speculate",
    "speculations",
    multiple=True,
    metavar="DRAFT",
    help="Measure answers with such drafts against answers without, by kind of prompt; repeatable.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --speculate: prompts, a JSON object a line with category and turns; 2 of each are taken.",
)
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True)
@click.option(
    "-n",
    "--tokens",
    type=click.IntRange(1, 1024),
    default=32,
    show_default=True,
    help="Tokens that are decoded in each round.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--enforce",
    is_flag=True,
    help="Have the kernel hold each case's budget too (Linux, where control groups can be made): one that "
    "passes it is killed.",
)
def command(
    attentions: tuple[str, ...],
    depths: tuple[int, ...],
    speculations: tuple[str, ...],
    prompts: Path | None,
    rounds: int,
    tokens: int,
    as_json: bool,
    enforce: bool,
    **options: Any,
) -> None:
    """Measure prompts and decoding at each depth against plain llama.cpp on the same file; an ONNX model
    against its graph in onnxruntime, with its own attention.

    All cases run interleaved, each in a process of its own; ratios are medians over the rounds, above 1
    we are faster. Run it on an idle machine. With --speculate, greedy answers to prompts of several kinds
    are timed against those of the same model without.
    """
    if speculations:
        if depths:
            raise click.UsageError(
                "--depth and --speculate are given: answers fill the cache themselves"
            )
        chosen = ("dense",) if attentions == DEFAULT_ATTENTIONS else attentions
        return measure_answers(
            chosen, speculations, prompts, rounds, tokens, options, as_json=as_json, enforce=enforce
        )
    if prompts is not None:
        raise click.UsageError("--prompts is for --speculate: name a draft, or leave it out")
    from lowtide.attention.registry import parse_policy
    from lowtide.cli.output import json_object, note
    from lowtide.models.errors import BadOption
    from lowtide.runtime.benchmark.attention import Bench, check_attentions

    check_attentions(attentions)
    spec = take_spec(options)
    options["attention"] = attentions[0]
    for attention in attentions:
        if parse_policy(attention).resolve(spec).prompt_selector is not None:
            raise BadOption(
                "attention is gem, which shortens prompts before they are read, and bench fills the cache "
                "itself: name dense or tidal"
            )
    wanted = tuple(
        sorted(set(depths or (d for d in DEFAULT_DEPTHS if d < spec.context_length - tokens)))
    )
    options["context"] = options["context"] or max(wanted) + tokens + 1
    planned = plan_with(spec, take_open_options(options))
    planned.require_fit()
    opened = {
        "memory": planned.plan.budget.num_bytes,
        "context": planned.plan.context,
        "kv_type": planned.plan.kv_type,
        "threads": planned.options.num_threads,
        "batch_size": planned.plan.batch_size,
        "repack": planned.options.repack,
    }
    cases = []
    with tidy_termination(), Bench(spec, attentions, opened, enforced=enforce) as bench:
        for depth in wanted:
            cases += bench.run(depth, rounds=rounds, tokens=tokens, progress=note)
    if as_json:
        click.echo(json_object(planned, cases=[case.to_dict() for case in cases]))
    else:
        _print_table(cases)


def _print_table(cases: list[BenchCase]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("attention", no_wrap=True)
    for name in ("depth", "decode\ntokens/s", "ratio", "prompt\ntokens/s", "ratio", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    for depth in sorted({case.depth for case in cases}):
        there = [case for case in cases if case.depth == depth]
        table.add_row(*_peer_row(there[0]))
        for case in there:
            table.add_row(*_row(case), end_section=case is there[-1])
    console = Console()
    console.print(table)
    for attention, policy in {case.attention: case.policy for case in cases}.items():
        if policy != attention:
            console.print(f"{attention}: {policy}", highlight=False)
    console.print(
        f"{_short_name(cases[0])} is {cases[0].peer}; a ratio above 1: we are faster",
        highlight=False,
    )


def _peer_row(case: BenchCase) -> list[str]:
    from lowtide.memory.units import format_bytes

    rates = f"{case.peer_decode_tokens_per_s:.1f}", "", f"{case.peer_prefill_tokens_per_s:.0f}", ""
    return [_short_name(case), f"{case.depth:,}", *rates, format_bytes(case.peer_peak_rss_bytes)]


def _short_name(case: BenchCase) -> str:
    return "llama" if case.peer.startswith("llama") else "graph"


def _row(case: BenchCase) -> list[str]:
    from lowtide.memory.units import format_bytes

    return [
        case.attention,
        f"{case.depth:,}",
        f"{case.decode_tokens_per_s:.1f}",
        f"{case.decode_ratio:.2f}",
        f"{case.prefill_tokens_per_s:.0f}",
        f"{case.prefill_ratio:.2f}",
        format_bytes(case.peak_rss_bytes),
    ]


DEFAULT_CONTEXT = 2048
MOST_OF_A_KIND = 2


def measure_answers(
    attentions: Sequence[str],
    speculations: Sequence[str],
    prompts: Path | None,
    rounds: int,
    tokens: int,
    options: dict[str, Any],
    *,
    as_json: bool,
    enforce: bool,
) -> None:
    """Measure each draft against the plain loop, under one attention, and print the cases."""
    from lowtide.cli.output import json_object, note
    from lowtide.models.errors import BadOption
    from lowtide.runtime.benchmark.speculation import (
        OWN_PROMPTS,
        SpeculationBench,
        check_speculations,
        read_prompts,
    )

    if len(attentions) > 1:
        raise BadOption(
            "attention names several policies, and answers are measured under one: name one"
        )
    check_speculations(speculations)
    kinds = OWN_PROMPTS if prompts is None else read_prompts(prompts, MOST_OF_A_KIND)
    spec = take_spec(options)
    options["attention"], options["speculate"] = attentions[0], speculations[0]
    options["context"] = options["context"] or min(DEFAULT_CONTEXT, spec.context_length)
    planned = plan_with(spec, take_open_options(options))
    planned.require_fit()
    opened = {
        "memory": planned.plan.budget.num_bytes,
        "context": planned.plan.context,
        "kv_type": planned.plan.kv_type,
        "threads": planned.options.num_threads,
        "batch_size": planned.plan.batch_size,
        "attention": attentions[0],
        "repack": planned.options.repack,
    }
    with (
        tidy_termination(),
        SpeculationBench(spec, speculations, opened, enforced=enforce) as bench,
    ):
        cases = bench.run(kinds, rounds=rounds, tokens=tokens, progress=note)
    if as_json:
        click.echo(json_object(planned, cases=[case.to_dict() for case in cases]))
    else:
        _print_speculation_table(cases)


def _print_speculation_table(cases: list[SpeculationCase]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("kind", "draft"):
        table.add_column(name, no_wrap=True)
    for name in ("plain\ntokens/s", "drafted\ntokens/s", "ratio", "accepted", "answers"):
        table.add_column(name, justify="right", no_wrap=True)
    for case in cases:
        table.add_row(
            case.kind,
            case.speculate,
            f"{case.plain_decode_tokens_per_s:.1f}",
            f"{case.decode_tokens_per_s:.1f}",
            f"{case.decode_ratio:.2f}",
            f"{case.accepted} of {case.drafted}",
            "the same" if case.same else "differ",
        )
    console = Console()
    console.print(table)
    for reason in dict.fromkeys(f"{c.kind}: {c.off_reason}" for c in cases if c.off_reason):
        console.print(reason, highlight=False)
    console.print(
        f"{cases[0].attention} without drafts is plain; a ratio above 1: speculation is faster",
        highlight=False,
    )
