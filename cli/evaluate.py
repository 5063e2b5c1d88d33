"""`lowtide evaluate`: how far an attention policy is from dense attention, on a text and on questions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.common.enforce import enforce_option, set_limit
from lowtide.cli.common.options import (
    json_option,
    opening_options,
    plan_with,
    take_open_options,
    take_spec,
    take_template_arguments,
    template_options,
    text_option,
)

if TYPE_CHECKING:
    from rich.console import Console

    from lowtide.memory.os.cgroup import ControlGroup
    from lowtide.runtime.evaluation.report import Evaluation, FilteredAnswer, FilterResult
    from lowtide.runtime.loading.load import Engine
    from lowtide.runtime.planning.plan import ResolvedModel


@click.command("evaluate", short_help="Compare an attention policy with dense attention.")
@opening_options
@template_options
@text_option
@click.option(
    "--windows",
    type=click.IntRange(1, 64),
    default=8,
    show_default=True,
    help="Number of positions in the text, with 64 tokens compared at each.",
)
@click.option(
    "--passkeys/--no-passkeys",
    default=True,
    show_default=True,
    help="Also hide passkeys in the text and ask for them. For gem: sentences of several kinds.",
)
@json_option
@enforce_option
def command(
    text: Path | None,
    windows: int,
    passkeys: bool,
    as_json: bool,
    enforce: ControlGroup | None,
    **options: Any,
) -> None:
    """Compare an attention policy with dense attention, up to --context tokens (default: 4,096).

    Reports the KL divergence, the change of the text's likelihood and the top-1 agreement over positions
    in the last quarter of the context. Reports also whether the model finds passkeys at three depths, with
    the policy and with dense attention. The default of --attention is tidal.

    The gem policy filters prompts for questions. For gem, sentences are hidden at three depths of --context
    tokens and of half of that, and the model is asked for them. Reports how many sentences the filter
    retained, and how many questions the model answers from the retained tokens compared with the whole
    prompt. Hard questions are counted separately (paraphrases, two questions at once, counting, and
    questions before the text). The reported likelihood is that of a text which continues a filtered prompt:
    it gets worse, so gem refuses to continue texts.
    """
    from lowtide.attention.registry import parse_policy
    from lowtide.cli.common.output import json_object, note
    from lowtide.runtime.evaluation.evaluate import (
        evaluate,
        evaluation_config,
        require_approximation,
    )
    from lowtide.runtime.evaluation.text import DEFAULT_CONTEXT, SPARE_TOKENS

    source = click.get_current_context().get_parameter_source("attention")
    if source is click.core.ParameterSource.DEFAULT:
        options["attention"] = "tidal"
    arguments = take_template_arguments(options)
    spec = take_spec(options)
    policy = parse_policy(options["attention"]).resolve(spec)
    require_approximation(policy, spec)
    config = take_open_options(options)
    context = config.context or min(DEFAULT_CONTEXT, spec.context_length - SPARE_TOKENS)
    planned = plan_with(spec, evaluation_config(config, policy, context))
    with _loaded(planned, enforce) as engine:
        report = evaluate(
            engine,
            policy,
            context=context,
            text=text,
            windows=windows,
            template_arguments=arguments,
            progress=note,
            **({} if passkeys else {"passkey_lengths": (), "kinds": ()}),
        )
    if as_json:
        click.echo(json_object(planned, **report.to_dict()))
    else:
        _print_report(report)


@contextlib.contextmanager
def _loaded(planned: ResolvedModel, enforce: ControlGroup | None) -> Iterator[Engine]:
    """Print the plan, set the limit, and load the model for the block."""
    from lowtide.cli.common.output import note, plan_line
    from lowtide.runtime.loading.load import Engine

    planned.require_fit()
    note(plan_line(planned))
    set_limit(enforce, planned.plan.budget)
    engine = Engine(planned)
    try:
        yield engine
    finally:
        engine.close()


def _print_report(report: Evaluation) -> None:
    from rich.console import Console

    console = Console()
    console.print(
        f"{report.attention}, compared with dense attention on {report.text}", highlight=False
    )
    if report.filtered is not None:
        _print_filter(console, report.filtered)
        return
    _print_distances(console, report)
    for passkey in report.passkeys:
        result = "found" if passkey.found else "lost"
        if not passkey.found and not passkey.dense:
            result = "not found, nor by dense attention"
        console.print(
            f"Passkey at {passkey.depth:.0%} of {passkey.length:,} tokens: {result}",
            highlight=False,
        )


def _print_distances(console: Console, report: Evaluation) -> None:
    from rich import box
    from rich.table import Table

    total = report.distance
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    table.add_column("Depth", justify="right", footer="all")
    table.add_column("KL, nats/token", justify="right", footer=f"{total.kl:.4f}")
    table.add_column("NLL change", justify="right", footer=f"{total.nll_change:+.2%}")
    table.add_column("Top-1 agreement", justify="right", footer=f"{total.top1_agreement:.1%}")
    for depth, found in report.distances:
        table.add_row(
            f"{depth:,}",
            f"{found.kl:.4f}",
            f"{found.nll_change:+.2%}",
            f"{found.top1_agreement:.1%}",
        )
    console.print(table)
    console.print(
        f"{total.num_tokens} tokens compared. A decoded token attends to {report.keys_read:.1%} of the "
        "cached keys.",
        highlight=False,
    )
    if report.scores is not None:
        console.print(f"{report.scores} while decoding", highlight=False)


def _print_filter(console: Console, found: FilterResult) -> None:
    from rich import box
    from rich.table import Table

    from lowtide.runtime.evaluation.report import QuestionCounts

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Questions", no_wrap=True)
    for heading in (
        "Asked",
        "Sentences\nretained",
        "Answered from\nthe whole prompt",
        "of these, from\nretained tokens",
    ):
        table.add_column(heading, justify="right")
    for name, answers in _groups(found):
        counts = QuestionCounts.of(answers)
        cells = (counts.asked, counts.retained, counts.dense, counts.found)
        table.add_row(name, *map(str, cells))
    if found.answers:
        console.print(table)
    console.print(
        f"Continuing a text from the retained tokens: NLL {found.nll:.3f} nats/token over "
        f"{found.num_tokens} tokens, {found.dense_nll:.3f} from the whole text ({found.nll_change:+.1%})",
        highlight=False,
    )


def _groups(found: FilterResult) -> Iterator[tuple[str, list[FilteredAnswer]]]:
    """Yield the answers by kind, by depth and by length; those to hard questions by kind."""
    from lowtide.attention.evaluation.questions import HARD_KINDS, KINDS

    answers = found.of_kinds(KINDS)
    for kind in KINDS:
        yield kind, found.of_kinds((kind,))
    for depth in sorted({answer.depth for answer in answers}):
        yield f"at {depth:.0%}", [answer for answer in answers if answer.depth == depth]
    for length in sorted({answer.length for answer in answers}):
        yield f"in {length:,} tokens", [a for a in answers if a.length == length]
    for kind in HARD_KINDS:
        yield f"hard: {kind}", found.of_kinds((kind,))
