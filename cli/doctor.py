"""`lowtide doctor`: shows the machine, the active kernels, and problems with the installation."""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from textwrap import indent
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.common.options import json_option
from lowtide.memory.units import MIB

if TYPE_CHECKING:
    from lowtide.runtime.loading.load import Engine

MIN_AVAILABLE_BYTES = 256 * MIB


@click.command("doctor", short_help="Check this machine and the installation.")
@click.argument("model", required=False)
@click.option(
    "--memory",
    metavar="SIZE",
    help="Memory budget of each choice that is timed, and of a pass.  [default: 80% of the available memory]",
)
@json_option
def command(model: str | None, memory: str | None, as_json: bool) -> None:
    """Show the machine, the active kernels, and problems. Exits with 1 if there is a problem.

    Runs one token of MODEL (by default, of the default model if it is installed) to see in how many of its
    layers lowtide's attention kernels run, and how it writes calls of tools. With MODEL, times the choices of kernels
    and threads in a few seconds.
    """
    import json

    import lowtide

    findings: dict[str, Any] = {"version": lowtide.__version__, "python": platform.python_version()}
    problems: list[str] = []
    attention = partial(_attention, model, memory)
    choices = partial(_choices, model, memory)
    buffers = partial(_gpu_buffers, model, memory)
    for examine in (
        *(_machine, _native, _llama, _gpus, _models, _folders),
        *(attention, buffers, choices),
    ):
        _examine(examine, findings, problems)
    if as_json:
        click.echo(json.dumps({**findings, "problems": problems}, indent=2))
    else:
        _print(findings, problems)
    if problems:
        sys.exit(1)


def _examine(
    examine: Callable[[], dict[str, Any]], findings: dict[str, Any], problems: list[str]
) -> None:
    from lowtide.models.errors import LowtideError

    try:
        found = examine()
    except LowtideError as error:
        if str(error) not in problems:  # such as a model that two examinations do not find
            problems.append(str(error))
        return
    problems += found.pop("problems", [])
    findings.update(found)


def _machine() -> dict[str, Any]:
    from lowtide.memory.machine import read_machine

    machine = read_machine()
    problems = []
    if machine.available_bytes < MIN_AVAILABLE_BYTES:
        problems.append(
            f"only {machine.available_bytes >> 20} MiB of memory are available, and the default model needs "
            "about 160 MiB: free some memory"
        )
    return {"machine": machine.to_dict(), "problems": problems}


def _native() -> dict[str, Any]:
    import lowtide
    from lowtide.attention.bindings.library import (
        cpu_features,
        native_version,
        usable_kernel_sets,
    )

    version = native_version()
    problems = []
    if version != lowtide.__version__:
        problems.append(
            f"the native library has version {version}, but lowtide has {lowtide.__version__}: reinstall lowtide"
        )
    return {
        "native_library": version,
        "cpu_features": list(cpu_features()),
        "attention_kernels": list(usable_kernel_sets()),
        "problems": problems,
    }


def _llama() -> dict[str, Any]:
    from lowtide.attention.bindings.library import can_map_lazily
    from lowtide.memory.os.kv_pages import can_use_demand_zero
    from lowtide.models.gguf.llama_cpp import llama_library

    library = llama_library()
    return {
        "llama_cpp": str(library.file),
        "llama_cpp_library": str(library.file.path),
        "llama_cpp_built_for": library.file.built_for(library.variant),
        "llama_cpp_kernels": library.system_info,
        "llama_cpp_layouts": "used"
        if library.repacks
        else "not used, because it was compiled for AMX: --repack or a build without AMX is faster",
        "kv_memory": "resident only for tokens in use"
        if can_use_demand_zero()
        else "completely resident from the start",
        "weights_memory": "can be streamed from the file"
        if can_map_lazily()
        else "always resident",
    }


def _gpus() -> dict[str, Any]:
    from lowtide.models.gguf.gpu import gpu_backends, read_gpu_devices

    devices = [asdict(device) for device in read_gpu_devices()]
    return {"gpu_backends": list(gpu_backends()), "gpus": devices}


def _models() -> dict[str, Any]:
    from lowtide.models.catalog import NAMED_MODELS, is_installed

    installed = [model.name for model in NAMED_MODELS if is_installed(model)]
    hub = importlib.util.find_spec("huggingface_hub") is not None
    return {"models_installed": installed, "hub": hub}


def _folders() -> dict[str, Any]:
    """Report where files can be stored; without a folder lowtide works, and stores nothing."""
    from lowtide.models.files.folders import (
        CACHE_VARIABLE,
        STATE_VARIABLE,
        cache_folder,
        state_folder,
        unusable,
    )

    found = {}
    for name, folder, variable in (
        ("cache_folder", cache_folder(), CACHE_VARIABLE),
        ("history_folder", state_folder(), STATE_VARIABLE),
    ):
        reason = unusable(folder, variable)
        found[name] = str(folder) if reason is None else f"none, because {reason}"
    return found


def _attention(reference: str | None, memory: str | None) -> dict[str, Any]:
    """Run one token with the tidal policy, which new users try first."""
    from lowtide.attention.bindings.llama_hook import LlamaHook
    from lowtide.memory.plan.planner import MIN_CONTEXT
    from lowtide.models.catalog import NAMED_MODELS, is_installed
    from lowtide.models.kind import DECODER, PURPOSES
    from lowtide.runtime.loading.load import Engine
    from lowtide.runtime.planning.plan import LoadConfig, find_spec, plan_spec

    hook = LlamaHook(threads=1)
    kernels = hook.kernels
    hook.close()
    if reference is None and not is_installed(NAMED_MODELS[0]):
        return {
            "attention_dense": f"works with the {kernels} kernels; no model is installed to try it"
        }
    spec = find_spec(reference)
    purpose = {"model": f"{spec.name} is {PURPOSES[spec.kind]}"}
    if spec.kind != DECODER:
        return purpose
    context = min(MIN_CONTEXT, spec.context_length)
    config = LoadConfig(
        memory=memory, context=context, batch_size=32, attention="tidal", repack=False
    )
    engine = Engine(plan_spec(spec, config))
    try:
        engine.model.forward((0,))
        counts, policy = engine.kernel_counts(), str(engine.planned.policy)
        calls = _call_format(engine)
        name, num_layers = engine.planned.spec.name, engine.planned.spec.num_layers
    finally:
        engine.close()
    assert counts is not None
    return {
        **purpose,
        "attention_dense": (
            f"runs in {counts.layers_native} of {num_layers} layers of {name}, with the {kernels} kernels"
        ),
        "attention_tidal": policy,
        **calls,
    }


def _call_format(engine: Engine) -> dict[str, Any]:
    """Return how the model writes calls of tools, found by rendering its chat template."""
    from lowtide.models.chat_template import ChatTemplate
    from lowtide.models.errors import TemplateError
    from lowtide.models.template.call_format import call_format
    from lowtide.models.template.families import template_of

    tokenizer = engine.model.tokenizer
    source, _family = template_of(engine.planned.spec, tokenizer)
    try:
        form = call_format(ChatTemplate(source, tokenizer.special_texts))
    except TemplateError as error:
        return {"tool_calls": f"none, because {error}"}
    origin = (
        "lowtide's own, since the template writes none" if form.is_generic else "the template's"
    )
    return {"tool_calls": origin, "tool_call_format": form.shown()}


def _choices(reference: str | None, memory: str | None) -> dict[str, Any]:
    """Time whose kernels and how many threads are fastest; nothing without a model, or for one that only embeds."""
    from lowtide.models.kind import DECODER
    from lowtide.runtime.benchmark.choices import time_choices
    from lowtide.runtime.planning.plan import find_spec

    if reference is None:
        return {}
    spec = find_spec(reference)
    if spec.kind != DECODER:
        return {}
    return {"choices": [choice.to_dict() for choice in time_choices(spec, memory)]}


def _gpu_buffers(reference: str | None, memory: str | None) -> dict[str, Any]:
    """Load as many layers as fit on the GPUs; compare the buffers that llama.cpp reports with the plan's lines."""
    from lowtide.memory.plan.planner import MIN_CONTEXT
    from lowtide.models.gguf.buffers import bytes_on
    from lowtide.models.gguf.gpu import read_gpu_devices
    from lowtide.models.kind import DECODER
    from lowtide.models.onnx.config import ENGINE
    from lowtide.runtime.loading.load import Engine
    from lowtide.runtime.planning.plan import LoadConfig, find_spec, plan_spec

    if reference is None or not read_gpu_devices():
        return {}
    spec = find_spec(reference)
    if spec.kind != DECODER or spec.engine == ENGINE:
        return {}
    context = min(MIN_CONTEXT, spec.context_length)
    engine = Engine(plan_spec(spec, LoadConfig(memory=memory, context=context, gpu_layers="auto")))
    try:
        plan, buffers = engine.planned.plan, engine.model.buffers
    finally:
        engine.close()
    return {
        "gpu_buffers": [
            {
                "device": gpu.device.name,
                "component": row.component,
                "planned_bytes": row.num_bytes,
                "bytes": bytes_on(buffers, gpu.device.name)[row.component],
            }
            for gpu in plan.gpus
            for row in gpu.rows
            if row.component in bytes_on(buffers, gpu.device.name)
        ]
    }


def _print_buffers(buffers: list[dict[str, Any]]) -> None:
    from lowtide.memory.units import format_bytes

    for one in buffers:
        sizes = f"{format_bytes(one['bytes'])} of {format_bytes(one['planned_bytes'])} planned"
        _line(f"{one['device']} buffer", f"{one['component']}: {sizes}")


def _print_choices(choices: list[dict[str, Any]]) -> None:
    click.echo(
        f"\n{'kernels':<20} {'threads':>7} {'prompt, tokens/s':>17} {'decode, tokens/s':>17}"
    )
    for choice in choices:
        begin = f"{choice['kernels']:<20} {choice['threads']:>7}"
        if choice["decode_tokens_per_s"] is None:
            click.echo(f"{begin} {choice['reason']}")
        else:
            prompt, decode = choice["prompt_tokens_per_s"], choice["decode_tokens_per_s"]
            click.echo(f"{begin} {prompt:>17,.0f} {decode:>17,.1f}")
    click.echo()


def _print(findings: dict[str, Any], problems: list[str]) -> None:
    from lowtide.memory.units import format_bytes

    for name, value in findings.items():
        if name == "machine":
            limit = f", limited by {value['limited_by']}" if value["limited_by"] else ""
            _line("machine", f"{value['processor']}, {_cores(value)}, {value['system']}")
            _line(
                "memory",
                f"{format_bytes(value['available_bytes'])} available of "
                f"{format_bytes(value['total_bytes'])}{limit}",
            )
        elif name == "gpus":
            _print_gpus(value, findings["gpu_backends"])
        elif name == "gpu_buffers":
            _print_buffers(value)
        elif name == "tool_call_format":
            click.echo(indent(value, "    "))
        elif name == "choices":
            _print_choices(value)
        else:
            _line(name.replace("_", " "), _text(value))
    for problem in problems:
        click.secho(f"Problem: {problem}", fg="red")
    if not problems:
        click.secho("No problems found.", fg="green")


def _cores(machine: dict[str, Any]) -> str:
    """Return how many CPUs lowtide uses, and the container's limit where there is one."""
    cores, quota = machine["cores"], machine["cpu_quota"]
    text = f"{cores} core{'' if cores == 1 else 's'}"
    if quota is None:
        return text
    return f"{text} (the container's quota is {quota:.2f} CPUs)"


def _print_gpus(devices: list[dict[str, Any]], backends: list[str]) -> None:
    from lowtide.memory.units import format_bytes
    from lowtide.models.gguf.gpu import HOW_TO_GET_ONE

    for device in devices:
        free, total = format_bytes(device["free_bytes"]), format_bytes(device["total_bytes"])
        shared = ", shared with the machine" if device["shares_memory"] else ""
        _line(device["name"], f"{device['description']}, {free} free of {total}{shared}")
    if not devices:
        cpu_only = f"none, because this llama.cpp was built for the CPU only: {HOW_TO_GET_ONE}"
        _line("gpus", "none found" if backends else cpu_only)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no: pip install 'lowtide[hub]'"
    return str(value)


def _line(name: str, text: str) -> None:
    click.echo(f"{name:<20} {text}")
