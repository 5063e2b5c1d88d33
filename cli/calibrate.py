"""`lowtide calibrate`: finds and keeps the settings of sparse attention for one model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.options import opening_options, plan_with, take_open_options, take_spec

if TYPE_CHECKING:
    from lowtide.attention.calibrate import Targets
    from lowtide.attention.calibration import Calibration
    from lowtide.runtime.loaded_model import LoadedModel

DEFAULT_CONTEXT = 4096


@click.command("calibrate")
@opening_options
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Measure on this text.  [default: Python's own language reference]",
)
@click.option(
    "--target-kl",
    type=click.FloatRange(1e-4, 1.0),
    default=0.015,
    show_default=True,
    help="The largest mean divergence from dense attention, in nats a token.",
)
@click.option(
    "--target-key-loss",
    type=click.FloatRange(1e-4, 10.0),
    default=0.1,
    show_default=True,
    help="The largest mean loss of log likelihood of a pass key hidden in the text, in nats.",
)
@click.option("--max-layers", type=click.IntRange(1, 32), default=8, show_default=True)
@click.option(
    "--k",
    "k_choices",
    multiple=True,
    type=click.IntRange(min=69),
    help="Keys that a sparse layer may read; repeatable.  [default: 256 to 1,536, a quarter of the "
    "context at most]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write the calibration here.  [default: the model's place in the cache folder]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    text: Path | None,
    target_kl: float,
    target_key_loss: float,
    max_layers: int,
    k_choices: tuple[int, ...],
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Find tidal's selection layers and k for a model, and keep them for --attention tidal.

    Searches at --context tokens (4,096 unless said) for the setting that reads the fewest keys inside
    --target-kl and --target-key-loss, holds it against text and pass keys that the search did not see, and
    writes it. Takes minutes: every candidate decodes some two hundred tokens.
    """
    from lowtide.attention.calibrate import Targets
    from lowtide.attention.calibration import save_calibration
    from lowtide.attention.quality import WINDOW_TOKENS
    from lowtide.cli.summary import json_object, note, plan_line
    from lowtide.runtime.loaded_model import LoadedModel

    options["attention"] = "dense"
    spec = take_spec(options)
    options["context"] = options["context"] or min(DEFAULT_CONTEXT, spec.context_length)
    wanted = replace(take_open_options(options), compared_rows=WINDOW_TOKENS)
    planned = plan_with(spec, replace(wanted, selection_layers=spec.num_layers))
    note(plan_line(planned))
    loaded = LoadedModel(planned)
    try:
        targets = Targets(target_kl, target_key_loss)
        found = _calibrated(loaded, text, targets, max_layers, k_choices)
    finally:
        loaded.close()
    path = save_calibration(found, output)
    if as_json:
        click.echo(json_object(planned, path=str(path), **found.to_dict()))
        return
    layers = ", ".join(map(str, found.selection_layers))
    click.echo(
        f"k {found.k}, selection layers {layers}: KL {found.kl:.4f} at {found.context:,} tokens, "
        f"loss {found.key_loss:.3f} at pass keys; a token attends to {found.keys_read:.1%} of the cached "
        "keys"
    )
    click.echo(f"written to {path}; --attention tidal takes it from now on")


def _calibrated(
    loaded: LoadedModel,
    text: Path | None,
    targets: Targets,
    max_layers: int,
    k_choices: tuple[int, ...],
) -> Calibration:
    from lowtide.attention.calibrate import K_CHOICES, Calibrator
    from lowtide.attention.calibration import Calibration
    from lowtide.attention.needles import chat_framing
    from lowtide.cli.summary import note
    from lowtide.models.errors import BadOption
    from lowtide.runtime.sample_text import BUILT_IN, read_sample, sample_tokens

    model, hook, context = loaded.model, loaded.hook, loaded.planned.plan.context
    assert hook is not None
    if context < 1024:
        raise BadOption(f"context is {context}: 1024 or more tokens are wanted to calibrate at")
    whose = BUILT_IN if text is None else str(text)
    sample = read_sample(text, 2 * context)
    token_ids = sample_tokens(model.tokenizer, sample, 2 * context + 2, whose=whose)
    search = Calibrator(model, hook, token_ids, context, chat_framing(model), progress=note)
    ks = k_choices or tuple(k for k in K_CHOICES if k <= context // 4)
    best = search.best(targets, max_layers, ks)
    return Calibration(
        fingerprint=loaded.planned.spec.fingerprint,
        model=loaded.planned.spec.name,
        k=best.k,
        selection_layers=best.selection_layers,
        kl=round(best.kl, 5),
        target_kl=targets.kl,
        key_loss=round(best.key_loss, 5),
        target_key_loss=targets.key_loss,
        context=context,
        keys_read=round(best.keys_read, 4),
        text=whose,
    )
