"""`lowtide doctor`: what this machine has, which kernels are active, and what is wrong."""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

MIN_CONTEXT = 512


@click.command("doctor")
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: str | None, as_json: bool) -> None:
    """Show what lowtide finds here; exits with 1 where something is wrong.

    Runs one token of MODEL (the default one, where it is installed) to see how many of its layers take
    our attention.
    """
    import json

    import lowtide

    findings: dict[str, Any] = {"version": lowtide.__version__, "python": platform.python_version()}
    problems: list[str] = []
    for examine in (_machine, _native, _llama, _gpus, _models, lambda: _attention(model)):
        _examined(examine, findings, problems)
    if as_json:
        click.echo(json.dumps({**findings, "problems": problems}, indent=2))
    else:
        _print(findings, problems)
    if problems:
        sys.exit(1)


def _examined(
    examine: Callable[[], dict[str, Any]], findings: dict[str, Any], problems: list[str]
) -> None:
    from lowtide.models.errors import LowtideError

    try:
        found = examine()
    except LowtideError as error:
        problems.append(str(error))
        return
    problems += found.pop("problems", [])
    findings.update(found)


def _machine() -> dict[str, Any]:
    from lowtide.memory.machine import read_machine

    machine = read_machine()
    problems = []
    if machine.available_bytes < 256 << 20:
        problems.append(
            f"only {machine.available_bytes >> 20} MiB of memory are available: the default model "
            "wants about 160"
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
            f"the native library is of version {version}, lowtide of {lowtide.__version__}: reinstall"
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
        "llama_cpp_python": library.version,
        "llama_cpp_kernels": library.system_info,
        "llama_cpp_layouts": "used"
        if library.repacks
        else "unused: it was compiled for AMX; --repack or a build without is faster",
        "kv_memory": "follows the tokens in use"
        if can_use_demand_zero()
        else "whole from the start",
        "weights_memory": "can be given back and read again for every pass"
        if can_map_lazily()
        else "stays resident",
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


def _attention(reference: str | None) -> dict[str, Any]:
    """Run a token under the policy that a person would try first."""
    from lowtide.attention.bindings.llama_hook import LlamaHook
    from lowtide.models.catalog import NAMED_MODELS, is_installed
    from lowtide.runtime.loading.load import Engine
    from lowtide.runtime.planning.plan import LoadConfig, plan_reference

    hook = LlamaHook(threads=1)
    kernels = hook.kernels
    hook.close()
    if reference is None and not is_installed(NAMED_MODELS[0]):
        return {"attention_dense": f"works, with the {kernels} kernels; no model to try it on"}
    options = LoadConfig(context=MIN_CONTEXT, batch_size=32, attention="tidal")
    loaded = Engine(plan_reference(reference, options))
    try:
        loaded.model.forward((0,))
        counts, policy = loaded.kernel_counts(), str(loaded.planned.policy)
        name, num_layers = loaded.planned.spec.name, loaded.planned.spec.num_layers
    finally:
        loaded.close()
    assert counts is not None
    return {
        "attention_dense": (
            f"{counts.layers_native} of {num_layers} layers ours in {name}, with the {kernels} kernels"
        ),
        "attention_tidal": policy,
    }


def _print(findings: dict[str, Any], problems: list[str]) -> None:
    from lowtide.memory.units import format_bytes

    for name, value in findings.items():
        if name == "machine":
            limit = f", limited by {value['limited_by']}" if value["limited_by"] else ""
            _line("machine", f"{value['processor']}, {value['cores']} cores, {value['system']}")
            _line(
                "memory",
                f"{format_bytes(value['available_bytes'])} available of "
                f"{format_bytes(value['total_bytes'])}{limit}",
            )
        elif name == "gpus":
            _print_gpus(value, findings["gpu_backends"])
        else:
            _line(name.replace("_", " "), _shown(value))
    for problem in problems:
        click.secho(f"Problem: {problem}", fg="red")
    if not problems:
        click.secho("Nothing is wrong.", fg="green")


def _print_gpus(devices: list[dict[str, Any]], backends: list[str]) -> None:
    from lowtide.memory.units import format_bytes
    from lowtide.models.gguf.gpu import HOW_TO_GET_ONE

    for device in devices:
        free, total = format_bytes(device["free_bytes"]), format_bytes(device["total_bytes"])
        shared = ", the machine's own memory" if device["shares_memory"] else ""
        _line(device["name"], f"{device['description']}, {free} free of {total}{shared}")
    if not devices:
        alone = f"none, llama-cpp-python is built for the processor alone: {HOW_TO_GET_ONE}"
        _line("gpus", "none that its backend finds" if backends else alone)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no: pip install 'lowtide[hub]'"
    return str(value)


def _line(name: str, text: str) -> None:
    click.echo(f"{name:<20} {text}")
