"""The options that several commands share, and the values that they become (`LoadConfig`, `SamplingParams`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from lowtide.models.spec import ModelSpec
    from lowtide.runtime.options import SamplingParams
    from lowtide.runtime.planning.expected import ExpectedPrompt
    from lowtide.runtime.planning.plan import LoadConfig, ResolvedModel

Command = TypeVar("Command", bound=Callable[..., Any])
MAX_THREADS = 512
Option = Callable[[Any], Any]

AUTO = "auto"


class ThreadCount(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A number of threads, or "auto"."""

    name = "N|auto"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        """Return the number, and None for "auto"."""
        if value == AUTO:
            return None
        if isinstance(value, str) and value.isdecimal() and 1 <= int(value) <= MAX_THREADS:
            return int(value)
        self.fail(f"{value!r} is not possible: use a number from 1 to {MAX_THREADS}, or auto")


_MODEL: tuple[Option, ...] = (
    click.argument("model", required=False),
    click.option("-m", "--model", "model_option", metavar="MODEL", help="The same as MODEL."),
    click.option(
        "--memory",
        metavar="SIZE",
        help="Memory budget of the whole process: 1GiB, 512MiB, 2G, 50%, or bytes.  "
        "[default: 80% of the available memory]",
    ),
    click.option(
        "-c",
        "--context",
        "--ctx-size",
        type=click.IntRange(min=1),
        metavar="TOKENS",
        help="Context length.  [default: the longest that fits, up to the model's own; for evaluate and "
        "calibrate: 4,096]",
    ),
    click.option(
        "--kv-type",
        type=click.Choice(["f16", "q8_0", "q4_0", "f32"]),
        help="Type of the KV cache. q8_0 and q4_0 are smaller and change answers slightly; f32 is for ONNX "
        "models only.  [default: f16 if it fits]",
    ),
    click.option(
        "-t",
        "--threads",
        type=ThreadCount(),
        default=AUTO,
        show_default=True,
        help="Number of threads; auto means the cores that this process may use, and fewer while others use them.",
    ),
    click.option(
        "--nice",
        "background",
        is_flag=True,
        help="Compute in the background: with the lowest priority, and one thread less than there are cores.",
    ),
    click.option(
        "--repack/--no-repack",
        default=None,
        help="Use lowtide's matmul kernels on a repacked copy of the weights (created in the cache folder on "
        "first use). For ONNX models this also enables lowtide's attention.  [default: auto, where the kernels "
        "know the weights, are not slower than the engine's own, and fit into the budget]",
    ),
    click.option("--pack", is_flag=True, hidden=True),
    click.option("--offline", is_flag=True, help="Never use the network."),
)

_ATTENTION = click.option(
    "--attention",
    default="auto",
    metavar="POLICY",
    help="Attention policy: auto (dense where it works and is not slower than the engine's own), llama "
    "(llama.cpp's own), dense (lowtide's kernels, exact), or an approximation: "
    "tidal (sparse decoding: each token reads the top-k keys), delta (similar keys share one score) or gem "
    "(only the prompt tokens that matter for the question are processed in full). Settings follow a colon: "
    "tidal:k=1024, delta:window=256, gem:k=512,layer=7.  [default: auto; for evaluate and calibrate: tidal]",
)

_REFERENCE = click.option(
    "--reference",
    is_flag=True,
    help="Run the engine's own kernels alone, token for token: --attention llama --no-repack.",
)

quality_option = click.option(
    "--quality",
    type=click.Choice(["exact", "high", "fast"]),
    default="exact",
    show_default=True,
    help="How close answers stay to exact ones: high takes the fastest calibrated policy whose measured KL divergence "
    "is inside 0.005 nats a token, fast inside 0.02 (and gem for questions on long prompts). lowtide says what it "
    "takes; without a calibration (lowtide calibrate) answers stay exact.",
)

_PROVIDER = click.option(
    "--provider",
    default="cpu",
    show_default=True,
    metavar="NAME",
    help="For ONNX models: the execution provider of onnxruntime, such as cuda, coreml, qnn or xnnpack. The "
    "plan does not include device memory that it allocates.",
)

prefix_cache_option = click.option(
    "--prefix-cache",
    default="0",
    show_default=True,
    metavar="SIZE",
    help="Keep the KV of earlier prompts in this much memory (part of --memory), so that returning to one of "
    "them does not compute it again.",
)

speculate_option = click.option(
    "--speculate",
    default="off",
    show_default=True,
    metavar="DRAFT",
    help="Speculative decoding: draft tokens and verify several in one pass when that is faster. ngram "
    "(prompt lookup), trigram (a table that learns), auto (both), or the path of a smaller model. Append "
    ":draft=4 to draft at most 4 tokens per pass.",
)

_GPU: tuple[Option, ...] = (
    click.option(
        "-ngl",
        "--gpu-layers",
        metavar="N|auto",
        help="Number of layers on the GPUs, counted like llama.cpp; auto means as many as fit.  "
        "[default: 0, or auto with --gpu-memory]",
    ),
    click.option(
        "--gpu-memory",
        metavar="SIZE",
        help="Memory budget on each GPU.  [default: its free memory]",
    ),
)

_SAMPLING: tuple[Option, ...] = (
    click.option(
        "-n",
        "--max-tokens",
        type=int,
        default=512,
        show_default=True,
        help="Maximum length of an answer, from 1; -1 means until the model stops or the context is full.",
    ),
    click.option(
        "--temp",
        "--temperature",
        "temperature",
        type=float,
        default=0.7,
        show_default=True,
        help="Sampling temperature; 0 is greedy and always gives the same answer.",
    ),
    click.option(
        "--top-k",
        type=int,
        default=40,
        show_default=True,
        help="Sample from the k most likely tokens; 0 disables it.",
    ),
    click.option(
        "--top-p",
        type=float,
        default=0.95,
        show_default=True,
        help="Sample from the most likely tokens up to this total probability; 1 disables it.",
    ),
    click.option(
        "--min-p",
        type=float,
        default=0.05,
        show_default=True,
        help="Minimum probability relative to the most likely token; 0 disables it.",
    ),
    click.option(
        "--repeat-penalty",
        type=float,
        default=1.0,
        show_default=True,
        help="Penalty for tokens that occurred recently; 1 disables it.",
    ),
    click.option(
        "--repeat-last-n",
        type=int,
        default=64,
        show_default=True,
        help="How many recent tokens --repeat-penalty considers; 0 disables it.",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        default=0.0,
        show_default=True,
        help="Subtract this from a token's logit for each time that the answer has it, -2 to 2; 0 disables it.",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        default=0.0,
        show_default=True,
        help="Subtract this once from the logits of tokens that the answer has, -2 to 2; 0 disables it.",
    ),
    click.option(
        "--logit-bias",
        multiple=True,
        metavar="ID=BIAS",
        help="Add BIAS, -100 (never) to 100, to the logit of the token with this id; repeatable.",
    ),
    click.option(
        "--seed",
        type=int,
        help="Seed of sampling; the same seed gives the same answer. -1 draws one.  [default: random, reported]",
    ),
    click.option(
        "--stop", multiple=True, metavar="TEXT", help="Stop the answer at this text; repeatable."
    ),
    click.option(
        "--overflow",
        type=click.Choice(["error", "drop-oldest"]),
        default="error",
        show_default=True,
        help="What to do with a prompt that is longer than the context.",
    ),
)

_EVALUATED_TEXT = click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Measure on this text.  [default: Python's own language reference]",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
system_option = click.option(
    "-s", "--system", help="System message at the start of the conversation."
)


_TEMPLATE: tuple[Option, ...] = (
    click.option(
        "--chat-template",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Use the chat template (jinja2) in this file.  [default: the model's own, or that of its family]",
    ),
    click.option(
        "--template-arg",
        "template_arguments",
        multiple=True,
        metavar="NAME=VALUE",
        help="Set a variable of the chat template, such as enable_thinking=false. VALUE is JSON, or else a text; "
        "repeatable.",
    ),
)


def template_options(command: Command) -> Command:
    """Add --chat-template and --template-arg, for every command that renders a chat template."""
    return _decorated(command, _TEMPLATE)


def opening_options(command: Command) -> Command:
    """Add MODEL, --memory, --context and the other options of loading a model."""
    return _decorated(command, (*_MODEL, _ATTENTION, _REFERENCE, *_GPU, _PROVIDER))


def opening_options_but_attention(command: Command) -> Command:
    """Add the options of loading a model on the CPU, for a command with an --attention of its own."""
    return _decorated(command, _MODEL)


def generation_options(command: Command) -> Command:
    """Add --max-tokens, --temp, --seed and the other options of a generation."""
    return _decorated(command, _SAMPLING)


def text_option(command: Command) -> Command:
    """Add --text, for commands that measure on a text."""
    return _decorated(command, (_EVALUATED_TEXT,))


def _decorated(command: Command, decorators: tuple[Option, ...]) -> Command:
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def planned_model(options: dict[str, Any]) -> ResolvedModel:
    """Remove the options of loading a model from `options`, and plan with them."""
    return plan_with(take_spec(options), take_open_options(options))


def take_spec(options: dict[str, Any]) -> ModelSpec:
    """Remove MODEL from `options`, find the model and read its headers."""
    from lowtide.runtime.planning.plan import find_spec

    argument, option = options.pop("model"), options.pop("model_option")
    if argument and option and argument != option:
        raise click.UsageError(f"two models are named, {argument} and {option}: name one")
    return find_spec(argument or option, offline=options.pop("offline"))


def take_open_options(options: dict[str, Any]) -> LoadConfig:
    """Remove the options of loading a model from `options`; raises `BadOption` for a wrong value."""
    from lowtide.runtime.planning.plan import LoadConfig

    names = (
        "memory context kv_type threads attention reference prefix_cache repack speculate gpu_layers gpu_memory "
        "provider expected_tokens chat_template structured rules_bytes quality background sequences"
    ).split()
    if options.pop("pack"):  # a hidden alias
        options["repack"] = True
    return LoadConfig(**{name: options.pop(name) for name in names if name in options})


def take_template_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Remove the template's arguments from `options` and return them by name."""
    arguments: dict[str, Any] = {}
    for stated in options.pop("template_arguments"):
        name, equals, value = stated.partition("=")
        if not equals or not name.isidentifier():
            raise click.UsageError(
                f"--template-arg is {stated!r}: write a name, = and a value, such as enable_thinking=false"
            )
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments


def plan_with(
    spec: ModelSpec, options: LoadConfig, prompt: ExpectedPrompt | None = None
) -> ResolvedModel:
    """Plan the model, with room for `prompt`, and print a warning if the budget is unusual."""
    from lowtide.runtime.planning.plan import plan_spec

    planned = plan_spec(spec, options, prompt=prompt)
    if planned.plan.budget.warning:
        click.echo(f"Warning: {planned.plan.budget.warning}", err=True)
    return planned


def take_generation_options(options: dict[str, Any]) -> SamplingParams:
    """Remove the options of a generation from `options`; raises `BadOption` for a wrong value."""
    from lowtide.runtime.options import SamplingParams

    names = (
        "max_tokens temperature top_k top_p min_p repeat_penalty repeat_last_n frequency_penalty presence_penalty "
        "seed stop overflow"
    ).split()
    biases = _biases(options.pop("logit_bias"))
    sampling = options.pop("sampling", None) or "masked"  # only some commands have it
    values = {name: options.pop(name) for name in names}
    return SamplingParams(logit_bias=biases, sampling=sampling, **values)


def _biases(stated: Sequence[str]) -> dict[str, str]:
    """Return biases by token id; the parameters check both."""
    biases = {}
    for one in stated:
        token_id, equals, bias = one.partition("=")
        if not equals:
            raise click.UsageError(
                f"--logit-bias is {one!r}: write a token's id, = and a number from -100 to 100, such as 42=-100"
            )
        biases[token_id] = bias
    return biases
