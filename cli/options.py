"""The options that several commands share, and the values they become. Knows no command."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from lowtide.models.spec import ModelSpec
    from lowtide.runtime.options import SamplingParams
    from lowtide.runtime.planning.plan import LoadConfig, ResolvedModel

Command = TypeVar("Command", bound=Callable[..., Any])

_OPENING = (
    click.argument("model", required=False),
    click.option("-m", "--model", "model_option", metavar="MODEL", help="The same as MODEL."),
    click.option(
        "--memory",
        metavar="SIZE",
        help="The most the whole process may have resident: 1GiB, 512MiB, 2G, 50%, bytes.  "
        "[default: 80% of what is available]",
    ),
    click.option(
        "-c",
        "--context",
        "--ctx-size",
        type=click.IntRange(min=1),
        metavar="TOKENS",
        help="Tokens of context.  [default: the most that fits, up to the model's own]",
    ),
    click.option(
        "--kv-type",
        type=click.Choice(["f16", "q8_0", "q4_0", "f32"]),
        help="Type of the KV cache; the smaller ones change answers slightly, and f32 is for ONNX models.  "
        "[default: f16 if it fits]",
    ),
    click.option(
        "-t", "--threads", type=click.IntRange(1, 512), help="Threads.  [default: all cores]"
    ),
    click.option(
        "--repack/--no-pack",
        default=False,
        show_default=True,
        help="Compute matrix products with our kernels, from a packed copy of the weights, which is made "
        "in the cache folder the first time; of an ONNX model attention is ours then, too.",
    ),
    click.option("--offline", is_flag=True, help="Never reach for the network."),
)

_ATTENTION = click.option(
    "--attention",
    default="llama",
    show_default=True,
    metavar="POLICY",
    help="llama (llama.cpp's kernels), dense (our own, exact), or an approximation: tidal (sparse "
    "decoding), delta (keys that are alike share a score) or gem (of a long prompt only what the question "
    "attends to is read); with settings, tidal:k=1024, delta:window=256, gem:k=512,layer=7.",
)

_PROVIDER = click.option(
    "--provider",
    default="cpu",
    show_default=True,
    metavar="NAME",
    help="ONNX models: the execution provider of onnxruntime, such as cuda, coreml, qnn or xnnpack. What "
    "it takes of a device's own memory is not planned.",
)

prefix_cache_option = click.option(
    "--prefix-cache",
    default="0",
    show_default=True,
    metavar="SIZE",
    help="Keep KV states of earlier prompts in so much memory, inside --memory: going back to one does "
    "not read it again.",
)

speculate_option = click.option(
    "--speculate",
    default="off",
    show_default=True,
    metavar="DRAFT",
    help="Draft tokens and verify several in one pass, where that pays: ngram (what followed the same text "
    "before), trigram (a table that learns), auto (both), or a smaller model's path; with ngram:rows=4, "
    "passes of at most 4 rows.",
)

_GPU = (
    click.option(
        "-ngl",
        "--gpu-layers",
        metavar="N|auto",
        help="Layers that go to the GPUs, as llama.cpp counts them; auto is as many as fit.  "
        "[default: 0, or auto with --gpu-memory]",
    ),
    click.option(
        "--gpu-memory",
        metavar="SIZE",
        help="The most on each GPU.  [default: 90% of what it has free]",
    ),
)

_GENERATION = (
    click.option(
        "-n",
        "--max-tokens",
        type=int,
        default=512,
        show_default=True,
        help="The longest answer; -1 goes on until the model ends or the context is full.",
    ),
    click.option(
        "--temp",
        "--temperature",
        "temperature",
        type=float,
        default=0.7,
        show_default=True,
        help="0 is greedy: the same answer every time.",
    ),
    click.option("--top-k", type=int, default=40, show_default=True, help="0 is off."),
    click.option("--top-p", type=float, default=0.95, show_default=True, help="1 is off."),
    click.option("--min-p", type=float, default=0.05, show_default=True, help="0 is off."),
    click.option("--repeat-penalty", type=float, default=1.0, show_default=True, help="1 is off."),
    click.option(
        "--seed", type=int, help="Repeats a sampled answer.  [default: drawn, and reported]"
    ),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer here; repeatable."),
    click.option(
        "--overflow",
        type=click.Choice(["error", "drop-oldest"]),
        default="error",
        show_default=True,
        help="What to do with a prompt beyond the context.",
    ),
)


def opening_options(command: Command) -> Command:
    """Add MODEL, --memory, --context and what else says how to open a model."""
    return _decorated(command, (*_OPENING, _ATTENTION, *_GPU, _PROVIDER))


def opening_options_but_attention(command: Command) -> Command:
    """Add what says how to open a model, for a command with an --attention of its own, on the processor."""
    return _decorated(command, _OPENING)


def generation_options(command: Command) -> Command:
    """Add -n, --temp, --seed and what else says how to answer."""
    return _decorated(command, _GENERATION)


def _decorated(command: Command, decorators: tuple[Callable[..., Any], ...]) -> Command:
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def planned_model(options: dict[str, Any]) -> ResolvedModel:
    """Take the opening options out of a command's `options` and plan with them."""
    return plan_with(take_spec(options), take_open_options(options))


def take_spec(options: dict[str, Any]) -> ModelSpec:
    """Take MODEL out of a command's `options` and read its headers."""
    from lowtide.runtime.planning.plan import find_spec

    argument, option = options.pop("model"), options.pop("model_option")
    if argument and option and argument != option:
        raise click.UsageError(f"two models are given, {argument} and {option}: give one")
    return find_spec(argument or option, offline=options.pop("offline"))


def take_open_options(options: dict[str, Any]) -> LoadConfig:
    """Take out what says how to open a model; raise `BadOption` for a value that cannot be."""
    from lowtide.runtime.planning.plan import LoadConfig

    names = (
        "memory context kv_type threads attention prefix_cache pack speculate gpu_layers gpu_memory "
        "provider"
    ).split()
    return LoadConfig(**{name: options.pop(name) for name in names if name in options})


def plan_with(spec: ModelSpec, options: LoadConfig) -> ResolvedModel:
    """Plan, and say what is odd about the budget."""
    from lowtide.runtime.planning.plan import plan_spec

    planned = plan_spec(spec, options)
    if planned.plan.budget.warning:
        click.echo(f"Warning: {planned.plan.budget.warning}", err=True)
    return planned


def take_generation_options(options: dict[str, Any]) -> SamplingParams:
    """Take the generation options out of a command's `options`; raise `BadOption` for a bad one."""
    from lowtide.runtime.options import SamplingParams

    names = "max_tokens temperature top_k top_p min_p repeat_penalty seed stop overflow".split()
    values = {name: options.pop(name) for name in names}
    if values["max_tokens"] == -1:
        values["max_tokens"] = None
    return SamplingParams(**values)
