"""`lowtide evaluate`: how far an attention policy is from dense attention, on a text and on needles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.enforce import enforce_option, hold
from lowtide.cli.options import opening_options, plan_with, take_open_options, take_spec

if TYPE_CHECKING:
    from lowtide.attention.policy import AttentionPolicy
    from lowtide.memory.os.cgroup import ControlGroup
    from lowtide.models.spec import ModelSpec
    from lowtide.runtime.evaluation.evaluate import Evaluation
    from lowtide.runtime.evaluation.prompt_filter import FilteredAnswer, FilterEvaluation
    from lowtide.runtime.loading.load import Engine
    from lowtide.runtime.planning.plan import ResolvedModel

DEFAULT_CONTEXT = 4096


@click.command("evaluate")
@opening_options
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Measure on this text.  [default: Python's own language reference]",
)
@click.option(
    "--windows",
    type=click.IntRange(1, 64),
    default=8,
    show_default=True,
    help="Places of 64 tokens that are compared.",
)
@click.option(
    "--passkeys/--no-passkeys",
    default=True,
    help="Also hide pass keys and ask for them; for gem, sentences of several kinds.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@enforce_option
def command(
    text: Path | None,
    windows: int,
    passkeys: bool,
    as_json: bool,
    enforce: ControlGroup | None,
    **options: Any,
) -> None:
    """Measure a policy's distance from dense attention at --context tokens (4,096 unless said).

    KL divergence, change of the text's likelihood and agreement on the likeliest token, over places in
    the last quarter of the context; and whether pass keys hidden at three depths are still found wherever
    dense attention finds them. --attention is tidal unless said. A policy that reads prompts in its own
    way (prompts=bf16) reads each of them again.

    gem is for questions: sentences are hidden at three depths of --context tokens and of half of that, and
    asked for. Reports how many were kept, and how many answers of the whole prompt are given from what was
    kept; on hard questions, too (in other words, two at once, counting, before the text), which it may
    lose. The likelihood is that of a text that goes on after what was kept of it: it gets worse, and so
    gem refuses to continue texts.
    """
    from lowtide.attention.evaluation.divergence import WINDOW_TOKENS
    from lowtide.attention.registry import parse_policy
    from lowtide.cli.output import json_object, note
    from lowtide.runtime.evaluation.evaluate import SPARE_TOKENS, evaluate

    source = click.get_current_context().get_parameter_source("attention")
    if source is click.core.ParameterSource.DEFAULT:
        options["attention"] = "tidal"
    spec = take_spec(options)
    policy = parse_policy(options["attention"])
    policy = policy.resolve(spec)
    if policy.prompt_selector is not None:
        _evaluate_filter(policy, spec, text, windows, passkeys, as_json, enforce, options)
        return
    context = options["context"] or min(DEFAULT_CONTEXT, spec.context_length - SPARE_TOKENS)
    options["context"] = context + SPARE_TOKENS
    planned = plan_with(spec, replace(take_open_options(options), compared_tokens=WINDOW_TOKENS))
    with _loaded(planned, enforce) as loaded:
        found = evaluate(
            loaded,
            context=context,
            text=text,
            windows=windows,
            passkey_lengths=None if passkeys else (),
            progress=note,
        )
    if as_json:
        click.echo(json_object(planned, **found.to_dict()))
    else:
        _print_table(found)


def _evaluate_filter(
    policy: AttentionPolicy,
    spec: ModelSpec,
    text: Path | None,
    windows: int,
    passkeys: bool,
    as_json: bool,
    enforce: ControlGroup | None,
    options: dict[str, Any],
) -> None:
    """Plan what follows the filter, which holds whole prompts here, and measure the filter."""
    from lowtide.attention.evaluation.questions import HARD_KINDS, KINDS
    from lowtide.cli.output import json_object, note
    from lowtide.runtime.evaluation.evaluate import SPARE_TOKENS
    from lowtide.runtime.evaluation.prompt_filter import evaluate_filter

    context = options["context"] or min(DEFAULT_CONTEXT, spec.context_length - SPARE_TOKENS)
    options.update(context=context + SPARE_TOKENS, attention=policy.following)
    memory = replace(policy.memory, filter_prefill=None)  # prompts are read whole, then scored
    config = replace(take_open_options(options), compared_tokens=1, attention_memory=memory)
    planned = plan_with(spec, config)
    with _loaded(planned, enforce) as loaded:
        found = evaluate_filter(
            loaded,
            policy,
            context=context,
            text=text,
            windows=windows,
            kinds=(*KINDS, *HARD_KINDS) if passkeys else (),
            progress=note,
        )
    if as_json:
        click.echo(json_object(planned, **found.to_dict()))
    else:
        _print_filter_table(found)


@contextlib.contextmanager
def _loaded(planned: ResolvedModel, enforce: ControlGroup | None) -> Iterator[Engine]:
    """Say the plan, hold it, and load the model for the block."""
    from lowtide.cli.output import note, plan_line
    from lowtide.runtime.loading.load import Engine

    planned.require_fit()
    note(plan_line(planned))
    hold(enforce, planned.plan.budget)
    loaded = Engine(planned)
    try:
        yield loaded
    finally:
        loaded.close()


def _print_filter_table(found: FilterEvaluation) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from lowtide.runtime.evaluation.prompt_filter import Counts

    console = Console()
    console.print(f"{found.attention}, against the whole prompt on {found.text}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("questions", no_wrap=True)
    for name in ("asked", "sentences\nkept", "whole prompt\nanswers", "of these,\nwhat was kept"):
        table.add_column(name, justify="right")
    for name, answers in _groups(found):
        counts = Counts.of(answers)
        cells = (counts.asked, counts.kept, counts.dense, counts.found)
        table.add_row(name, *map(str, cells))
    if found.answers:
        console.print(table)
    console.print(
        f"a text that goes on after what was kept of it: NLL {found.nll:.3f} nats a token over "
        f"{found.num_tokens} tokens, {found.dense_nll:.3f} after all of it ({found.nll_change:+.1%})",
        highlight=False,
    )


def _groups(found: FilterEvaluation) -> Iterator[tuple[str, list[FilteredAnswer]]]:
    """The answers by kind, depth and length, and those to hard questions by kind."""
    from lowtide.attention.evaluation.questions import HARD_KINDS, KINDS

    answers = found.of_kinds(KINDS)
    for kind in KINDS:
        yield kind, found.of_kinds((kind,))
    for depth in sorted({answer.depth for answer in answers}):
        yield f"at {depth:.0%}", [answer for answer in answers if answer.depth == depth]
    for length in sorted({answer.length for answer in answers}):
        yield f"of {length:,} tokens", [a for a in answers if a.length == length]
    for kind in HARD_KINDS:
        yield f"hard: {kind}", found.of_kinds((kind,))


def _print_table(found: Evaluation) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    total = found.distance
    table.add_column("tokens before", justify="right", footer="all")
    table.add_column("KL, nats", justify="right", footer=f"{total.kl:.4f}")
    table.add_column("NLL change", justify="right", footer=f"{total.nll_change:+.2%}")
    table.add_column("top-1 agreement", justify="right", footer=f"{total.top1_agreement:.1%}")
    for depth, place in found.distances:
        table.add_row(
            f"{depth:,}",
            f"{place.kl:.4f}",
            f"{place.nll_change:+.2%}",
            f"{place.top1_agreement:.1%}",
        )
    console = Console()
    console.print(f"{found.attention}, against dense attention on {found.text}", highlight=False)
    console.print(table)
    console.print(
        f"{total.num_tokens} tokens compared; a token attends to {found.keys_read:.1%} of the cached "
        "keys",
        highlight=False,
    )
    if found.scores is not None:
        console.print(f"{found.scores} in decoding", highlight=False)
    for passkey in found.passkeys:
        answer = "found" if passkey.found else "lost"
        if not passkey.found and not passkey.dense:
            answer = "not found, and not by dense attention either"
        where = f"pass key at {passkey.depth:.0%} of {passkey.length:,} tokens"
        console.print(f"{where}: {answer}", highlight=False)
