"""`lowtide calibrate`: finds and saves the settings of an approximate policy for one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.common.options import (
    opening_options,
    plan_with,
    take_open_options,
    take_spec,
    take_template_arguments,
    template_options,
    text_option,
)

if TYPE_CHECKING:
    from lowtide.attention.calibrator import CalibrationContext, Calibrator
    from lowtide.models.spec import ModelSpec
    from lowtide.runtime.loading.load import Engine

DEFAULT_CONTEXT, MIN_CONTEXT = 4096, 1024
DEFAULT_POLICY = "tidal"
SEARCH_OPTIONS = {
    "target_kl": "--target-kl",
    "target_key_loss": "--target-key-loss",
    "max_layers": "--max-layers",
    "k": "--k",
}


@click.command("calibrate")
@opening_options
@template_options
@text_option
@click.option(
    "--target-kl",
    type=click.FloatRange(1e-4, 1.0),
    default=0.015,
    show_default=True,
    help="tidal, delta: the largest mean KL divergence from dense attention, in nats/token.",
)
@click.option(
    "--target-key-loss",
    type=click.FloatRange(1e-4, 10.0),
    default=0.1,
    show_default=True,
    help="tidal, delta: the largest mean loss of log likelihood of a hidden passkey, in nats.",
)
@click.option(
    "--max-layers",
    type=click.IntRange(1, 32),
    default=8,
    show_default=True,
    help="tidal: the most selection layers.",
)
@click.option(
    "--k",
    multiple=True,
    type=click.IntRange(min=69),
    help="A k to try: keys that tidal's sparse layers read, or tokens that gem retains; repeatable.  "
    "[default: 256 to 1,536 for tidal, 512 to 1,024 for gem, at most a quarter of the context]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write the calibration here.  [default: into the cache folder]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    text: Path | None,
    target_kl: float,
    target_key_loss: float,
    max_layers: int,
    k: tuple[int, ...],
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the best settings of --attention tidal (the default), delta or gem for a model, and save them.

    tidal: searches for the selection layers and the k that read the fewest keys inside --target-kl and
    --target-key-loss, at --context tokens (default 4,096). With tidal:layers=4+7+18 it searches for k only.

    delta: measures the error of each layer and KV head with several numbers of key groups (with
    delta:granularity=block or element: several thresholds), and takes the highest sparsity inside the
    targets that loses no passkey.

    gem: hides sentences in prompts of --context tokens and of half of that, asks for them (a passkey, a
    fact, two facts, at three depths), and searches for the cheapest layer and k that retain them all with a
    quarter of k to spare, and lose at most one in twenty answers of whole prompts. With gem:layer=N it tries
    that layer only.

    The result is checked on text and questions that the search did not see. Takes minutes.
    """
    from lowtide.attention.calibration import save_calibration
    from lowtide.attention.calibrator import CalibrationRequest, Targets
    from lowtide.cli.common.output import json_object, note, plan_line
    from lowtide.runtime.loading.load import Engine

    calibrator = _calibrator(options["attention"])
    _check_output(output)
    arguments = take_template_arguments(options)
    spec = take_spec(options)
    _check_engine(spec)
    request = CalibrationRequest(Targets(target_kl, target_key_loss), max_layers, k)
    calibrator.check(spec, request)
    options["context"] = options["context"] or min(DEFAULT_CONTEXT, spec.context_length)
    options["expected_tokens"] = options["context"]
    options["attention"] = "dense"
    config = replace(
        take_open_options(options),
        compared_tokens=calibrator.compared_tokens,
        attention_memory=calibrator.memory(spec),
    )
    planned = plan_with(spec, config)
    note(plan_line(planned))
    engine = Engine(planned)
    try:
        found = calibrator.search(_context(engine, text, arguments), request)
    finally:
        engine.close()
    path = save_calibration(found, output)
    if as_json:
        click.echo(json_object(planned, path=str(path), **found.to_dict()))
        return
    click.echo(calibrator.describe(found))
    usage = calibrator.usage
    if output is None:
        click.echo(f"written to {path}; --attention {usage} uses it from now on")
    else:
        separator = "," if ":" in usage else ":"
        click.echo(f"written to {path}; --attention {usage}{separator}calibration={path} uses it")


def _calibrator(attention: str) -> Calibrator:
    """Return the policy's calibrator; raises `BadOption` for options that it does not use."""
    from lowtide.attention.registry import POLICIES, parse_policy
    from lowtide.models.errors import BadOption

    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    if context.get_parameter_source("attention") is default:
        attention = DEFAULT_POLICY
    policy = parse_policy(attention)
    calibrator = policy.calibrator
    if calibrator is None:
        names = [name for name, known in POLICIES.items() if known().calibrator is not None]
        raise BadOption(
            f"attention is {attention!r}, which has nothing to calibrate; it must be one of "
            f"{', '.join(names)}"
        )
    for name, option in SEARCH_OPTIONS.items():
        if name not in calibrator.options and context.get_parameter_source(name) is not default:
            raise BadOption(f"{policy.name} is calibrated without {option}: leave it out")
    return calibrator


def _check_output(output: Path | None) -> None:
    """Raise `CalibrationError` now, and not after minutes, where the result could not be saved."""
    from lowtide.attention.calibration import CalibrationError, calibration_folder
    from lowtide.models.files.folders import CACHE_VARIABLE, unusable

    folder = calibration_folder() if output is None else output.absolute().parent
    reason = unusable(folder, CACHE_VARIABLE)
    if reason is not None:
        raise CalibrationError(
            f"the calibration could not be saved, because {reason}, or use --output"
        )


def _check_engine(spec: ModelSpec) -> None:
    from lowtide.models.errors import BadOption
    from lowtide.runtime.planning.plan import backend_for

    if not backend_for(spec).supports_calibration:
        raise BadOption(
            f"{spec.name} is an ONNX graph, and calibrate runs GGUF models only: calibrate the GGUF file "
            "(lowtide convert keeps its calibration), or set the policy's settings yourself"
        )


def _context(engine: Engine, text: Path | None, arguments: Mapping[str, Any]) -> CalibrationContext:
    """Return the loaded model with a text of twice its context."""
    from lowtide.attention.calibrator import CalibrationContext
    from lowtide.cli.common.output import note
    from lowtide.models.errors import BadOption
    from lowtide.runtime.evaluation.text import BUILT_IN, framing_of, read_sample, sample_tokens

    context = engine.planned.plan.context
    if context < MIN_CONTEXT:
        raise BadOption(f"context is {context}; it must be {MIN_CONTEXT} or more to calibrate")
    assert engine.hook is not None, "dense attention has a hook"
    source = BUILT_IN if text is None else str(text)
    sample = read_sample(text, 2 * context)
    tokenizer = engine.model.tokenizer
    return CalibrationContext(
        model=engine.model,
        hook=engine.hook,
        token_ids=sample_tokens(tokenizer, sample, 2 * context + 2, source=source),
        context=context,
        framing=framing_of(engine, arguments),
        text=source,
        progress=note,
    )
