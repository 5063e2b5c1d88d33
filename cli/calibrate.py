"""`lowtide calibrate`: finds and keeps the settings of an approximation for one model.

What `lowtide calibrate --attention delta` does beyond the command.

What `lowtide calibrate` does with what it found: writes it, and says what it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.options import opening_options, plan_with, take_open_options, take_spec

if TYPE_CHECKING:
    from lowtide.attention.delta.blocks import DeltaBlocks, DeltaBlocksCalibration
    from lowtide.attention.delta.tokens import Delta, DeltaCalibration
    from lowtide.attention.gem.policy import Gem, GemCalibration
    from lowtide.attention.tidal.calibrate import Targets
    from lowtide.attention.tidal.policy import Tidal, TidalCalibration
    from lowtide.models.spec import ModelSpec
    from lowtide.runtime.loading.load import Engine


DEFAULT_CONTEXT = 4096
NOT_FOR = {"gem": ("target_kl", "target_key_loss", "max_layers"), "delta": ("max_layers",)}


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
    help="tidal, delta: the largest mean divergence from dense attention, in nats a token.",
)
@click.option(
    "--target-key-loss",
    type=click.FloatRange(1e-4, 10.0),
    default=0.1,
    show_default=True,
    help="tidal, delta: the largest mean loss of log likelihood of a hidden pass key, in nats.",
)
@click.option(
    "--max-layers",
    type=click.IntRange(1, 32),
    default=8,
    show_default=True,
    help="tidal: the most layers that select.",
)
@click.option(
    "--k",
    "k_choices",
    multiple=True,
    type=click.IntRange(min=69),
    help="Keys that tidal's sparse layers may read, or tokens that gem may keep; repeatable.  [default: "
    "256 to 1,536 for tidal, 512 to 1,024 for gem, a quarter of the context at most]",
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
    """Find what --attention tidal (the default), gem or delta does best with a model, and keep it for them.

    For tidal, searches at --context tokens (4,096 unless said) for the selection layers and the k that
    read the fewest keys inside --target-kl and --target-key-loss; tidal:layers=4+7+18 looks at those
    layers alone. For gem, hides sentences in prompts of up
    to --context tokens and of half of that, asks for them (a pass key, a fact, two facts, at three depths),
    and searches for the layer and the k that cost the least, keep them all with a quarter of k to spare,
    and lose at most one in twenty of the answers of whole prompts; gem:layer=N looks at that layer alone,
    other settings are the rule to search with. For delta, measures what each layer and KV head loses with
    so many groups of keys (delta:granularity=block or element: with each threshold of its blocks), and
    takes the highest sparsity inside --target-kl and --target-key-loss that loses no pass key. Each is held
    against text and questions that the search did not see, and written. Takes minutes.
    """
    from lowtide.attention.delta.blocks import DeltaBlocks
    from lowtide.attention.delta.tokens import Delta
    from lowtide.attention.evaluation.divergence import WINDOW_TOKENS
    from lowtide.attention.gem.policy import Gem
    from lowtide.attention.tidal.calibrate import Targets
    from lowtide.cli import calibrate as delta_calibration
    from lowtide.cli import calibrate as found_calibration
    from lowtide.cli.output import json_object, note, plan_line
    from lowtide.runtime.loading.load import Engine

    policy = _wanted_policy(options["attention"])
    options["attention"] = "dense"
    spec = take_spec(options)
    _check_graph(spec)
    options["context"] = options["context"] or min(DEFAULT_CONTEXT, spec.context_length)
    if isinstance(policy, Gem):
        _check_gem(policy, spec, k_choices)
    elif isinstance(policy, Delta | DeltaBlocks):
        delta_calibration.check_delta(policy, k_choices)
        options["attention"] = delta_calibration.planned_as(policy, spec)
    elif policy.selection_layers is not None:
        policy.resolve(spec)
    compared_tokens = 1 if isinstance(policy, Gem) else WINDOW_TOKENS
    wanted = replace(take_open_options(options), compared_tokens=compared_tokens)
    planned = plan_with(spec, replace(wanted, selection_layers=spec.num_layers))
    note(plan_line(planned))
    loaded = Engine(planned)
    try:
        found = _searched(
            loaded, text, policy, Targets(target_kl, target_key_loss), max_layers, k_choices
        )
    finally:
        loaded.close()
    path, said = found_calibration.saved(found, output)
    if as_json:
        click.echo(json_object(planned, path=str(path), **found.to_dict()))
        return
    click.echo(said)
    typed = policy.told if isinstance(policy, DeltaBlocks) else policy.name
    if output is None:
        click.echo(f"written to {path}; --attention {typed} takes it from now on")
    else:
        also = "," if ":" in typed else ":"
        click.echo(f"written to {path}; --attention {typed}{also}calibration={path} takes it")


def _searched(
    loaded: Engine,
    text: Path | None,
    policy: Tidal | Gem | Delta | DeltaBlocks,
    targets: Targets,
    max_layers: int,
    k_choices: tuple[int, ...],
) -> TidalCalibration | GemCalibration | DeltaCalibration | DeltaBlocksCalibration:
    from lowtide.attention.delta.blocks import DeltaBlocks
    from lowtide.attention.delta.tokens import Delta
    from lowtide.attention.gem.policy import Gem
    from lowtide.cli import calibrate as delta_calibration

    if isinstance(policy, Gem):
        return _gem_calibrated(loaded, text, policy, k_choices)
    if isinstance(policy, Delta | DeltaBlocks):
        token_ids, whose = _sample(loaded, text)
        return delta_calibration.calibrated(loaded, token_ids, whose, targets, policy)
    return _calibrated(loaded, text, targets, policy, max_layers, k_choices)


def _wanted_policy(attention: str) -> Tidal | Gem | Delta | DeltaBlocks:
    """Return the policy to calibrate; what is said for the other one is a mistake."""
    from lowtide.attention.delta.blocks import DeltaBlocks
    from lowtide.attention.delta.tokens import Delta
    from lowtide.attention.gem.policy import Gem
    from lowtide.attention.parse import parse_policy
    from lowtide.attention.tidal.policy import Tidal
    from lowtide.models.errors import BadOption

    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    if context.get_parameter_source("attention") is default:
        return Tidal()
    policy = parse_policy(attention)
    if isinstance(policy, Tidal) and policy == Tidal(selection_layers=policy.selection_layers):
        return policy
    if not isinstance(policy, Gem | Delta | DeltaBlocks):
        raise BadOption(
            f"attention is {attention!r}: tidal, with its layers at the most (k is what is searched for), "
            "gem or delta is wanted"
        )
    stated = [
        name for name in NOT_FOR[policy.name] if context.get_parameter_source(name) is not default
    ]
    if stated:
        raise BadOption(
            f"--{stated[0].replace('_', '-')} is for tidal: leave it out, or {policy.name}"
        )
    return policy


def _check_graph(spec: ModelSpec) -> None:
    from lowtide.models.errors import BadOption
    from lowtide.models.onnx.spec import OnnxSpec

    if isinstance(spec, OnnxSpec):
        raise BadOption(
            f"calibrate is for models that llama.cpp runs, and {spec.name} is an ONNX graph: calibrate the "
            "GGUF file, whose calibration lowtide convert passes on, or state what was found"
        )


def _check_gem(policy: Gem, spec: ModelSpec, k_choices: tuple[int, ...]) -> None:
    """Refuse, before anything is loaded, what cannot be calibrated."""
    from lowtide.attention.gem.policy import DEFAULT_K
    from lowtide.models.errors import BadOption

    if policy.calibration is not None:
        raise BadOption("gem's calibration is given, and is what calibrate makes: leave it out")
    if policy.k is not None and (policy.k < 1 or k_choices):
        raise BadOption(
            f"gem's k is {policy.k}{' and --k is given' if k_choices else ''}: say once, as a number of "
            "tokens, what to calibrate for"
        )
    if policy.layer is not None:
        replace(policy, k=policy.k or DEFAULT_K).resolve(spec)


def _calibrated(
    loaded: Engine,
    text: Path | None,
    targets: Targets,
    policy: Tidal,
    max_layers: int,
    k_choices: tuple[int, ...],
) -> TidalCalibration:
    from lowtide.attention.evaluation.passkeys import chat_framing
    from lowtide.attention.tidal.calibrate import K_CHOICES, TidalSearch
    from lowtide.attention.tidal.policy import TidalCalibration
    from lowtide.cli.output import note

    model, hook, context = loaded.model, loaded.hook, loaded.planned.plan.context
    assert hook is not None
    token_ids, whose = _sample(loaded, text)
    search = TidalSearch(model, hook, token_ids, context, chat_framing(model), progress=note)
    ks = k_choices or tuple(k for k in K_CHOICES if k <= context // 4)
    if policy.selection_layers is None:
        best = search.best(targets, max_layers, ks)
    else:
        best = search.of_layers(targets, policy.selection_layers, ks)
    return TidalCalibration(
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


def _gem_calibrated(
    loaded: Engine, text: Path | None, policy: Gem, k_choices: tuple[int, ...]
) -> GemCalibration:
    from lowtide.attention.evaluation.passkeys import chat_framing
    from lowtide.attention.gem.calibrate import CONTEXTS_OF_K, K_CHOICES, GemSearch
    from lowtide.cli.output import note
    from lowtide.models.errors import BadOption

    if policy.k is not None and (policy.k < 1 or k_choices):
        raise BadOption(
            "gem's k is given: state it once, as a number of tokens, to calibrate for it"
        )
    model, hook, context = loaded.model, loaded.hook, loaded.planned.plan.context
    assert hook is not None
    token_ids, whose = _sample(loaded, text)
    search = GemSearch(model, hook, token_ids, context, chat_framing(model), policy, progress=note)
    most = context // CONTEXTS_OF_K
    ks = tuple(k for k in K_CHOICES if k <= most) or (most,)
    if policy.k is not None:
        ks = (int(policy.k),)
    return search.calibration(k_choices or ks, text=whose)


def _sample(loaded: Engine, text: Path | None) -> tuple[Sequence[int], str]:
    """The text to measure on, twice the context, and whose it is."""
    from lowtide.models.errors import BadOption
    from lowtide.runtime.evaluation.text import BUILT_IN, read_sample, sample_tokens

    context = loaded.planned.plan.context
    if context < 1024:
        raise BadOption(f"context is {context}: 1024 or more tokens are wanted to calibrate at")
    whose = BUILT_IN if text is None else str(text)
    sample = read_sample(text, 2 * context)
    return sample_tokens(loaded.model.tokenizer, sample, 2 * context + 2, whose=whose), whose


def check_delta(policy: Delta | DeltaBlocks, k_choices: tuple[int, ...]) -> None:
    """Refuse, before anything is loaded, what is searched for or has no meaning."""
    from lowtide.models.errors import BadOption

    stated = [
        name
        for name in ("calibration", "sparsity", "threshold")
        if getattr(policy, name, None) is not None
    ]
    if stated:
        raise BadOption(f"delta's {stated[0]} is given, and is what calibrate finds: leave it out")
    if k_choices:
        raise BadOption("--k is for tidal and gem: leave it out, or delta")


def planned_as(policy: Delta | DeltaBlocks, spec: ModelSpec) -> Delta | DeltaBlocks:
    """Return a policy whose memory is the most that the search takes."""
    from lowtide.attention.delta.blocks import DeltaBlocks, HeadThresholds
    from lowtide.attention.delta.tokens import HeadGroups
    from lowtide.memory.plan.estimates import PAGE_KEYS

    shape = (spec.num_layers, max(spec.num_kv_heads), spec.key_head_dim)
    if isinstance(policy, DeltaBlocks):
        return replace(policy, units=HeadThresholds.uniform(*shape, block=policy.channels)).resolve(
            spec
        )
    return replace(policy, units=HeadGroups.uniform(*shape, PAGE_KEYS - 1), store=0).resolve(spec)


def calibrated(
    loaded: Engine,
    token_ids: Sequence[int],
    whose: str,
    targets: Targets,
    policy: Delta | DeltaBlocks,
) -> DeltaCalibration | DeltaBlocksCalibration:
    """Search with the loaded model."""
    from lowtide.attention.delta.blocks import DeltaBlocks
    from lowtide.attention.delta.calibrate import DeltaBlocksSearch, DeltaSearch
    from lowtide.attention.evaluation.passkeys import chat_framing
    from lowtide.cli.output import note

    model, hook, context = loaded.model, loaded.hook, loaded.planned.plan.context
    assert hook is not None
    place = (model, hook, token_ids, context, chat_framing(model))
    if isinstance(policy, DeltaBlocks):
        return DeltaBlocksSearch(*place, policy, progress=note).calibration(targets, text=whose)
    return DeltaSearch(*place, policy, progress=note).calibration(targets, text=whose)


def saved(
    found: TidalCalibration | GemCalibration | DeltaCalibration | DeltaBlocksCalibration,
    output: Path | None,
) -> tuple[Path, str]:
    """Write what was found, to `output` or its place in the cache; return where, and what to say of it."""
    from lowtide.attention.delta.blocks import DeltaBlocksCalibration, save_blocks_calibration
    from lowtide.attention.delta.tokens import DeltaCalibration, save_delta_calibration
    from lowtide.attention.gem.policy import save_gem_calibration
    from lowtide.attention.tidal.policy import TidalCalibration, save_tidal_calibration

    if isinstance(found, TidalCalibration):
        return save_tidal_calibration(found, output), _tidal_line(found)
    if isinstance(found, DeltaCalibration):
        return save_delta_calibration(found, output), _delta_line(found)
    if isinstance(found, DeltaBlocksCalibration):
        return save_blocks_calibration(found, output), _state_line(found)
    return save_gem_calibration(found, output), _gem_line(found)


def _tidal_line(found: TidalCalibration) -> str:
    layers = ", ".join(map(str, found.selection_layers))
    return (
        f"k {found.k}, selection layers {layers}: KL {found.kl:.4f} at {found.context:,} tokens, "
        f"loss {found.key_loss:.3f} at pass keys; a token attends to {found.keys_read:.1%} of the cached "
        "keys"
    )


def _gem_line(found: GemCalibration) -> str:
    return (
        f"k {found.k}, layer {found.layer}: of {found.num_asked} questions on up to {found.context:,} "
        f"tokens {found.num_kept} had their sentences kept, with {found.margin:.0%} of k to spare; whole "
        f"prompts answer {found.num_dense_answered}, what was kept {found.num_answered} of these"
    )


def _delta_line(found: DeltaCalibration) -> str:
    return (
        f"sparsity {found.units.sparsity:.1%}: KL {found.kl:.4f} at {found.context:,} tokens, loss "
        f"{found.key_loss:.3f} at pass keys; a token attends to {found.keys_read:.1%} of the cached keys, "
        "groups counted once"
    )


def _state_line(found: DeltaBlocksCalibration) -> str:
    return (
        f"sparsity {found.units.sparsity:.1%} behind the window: KL {found.kl:.4f} at {found.context:,} "
        f"tokens, loss {found.key_loss:.3f} at pass keys"
    )
