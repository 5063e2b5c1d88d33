"""A model's first pass in a new process that loads the model itself: what a device has cannot be forked.

llama.cpp ends a process in which it meets a tensor type that a device has no kernel for. So a model with unusual types
is tried before it is loaded here, and the two are never loaded at once.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowtide.attention.bindings.decode import TRY_SECONDS, install_guarded_passes, signal_in_words
from lowtide.models.errors import ForwardError, LowtideError
from lowtide.models.gguf.model import GgufModel
from lowtide.models.gguf.parameters import DeviceLayers, LoadOptions
from lowtide.models.read_spec import read_spec
from lowtide.models.spec import KV_PADDING

PROGRAM = "from lowtide.runtime.backends.first_pass import main; main()"
SENT = ("kv_type", "memory_map", "repack", "gpu_attention")
"""The fields of `LoadOptions` that the trial has in common with the real model."""


def try_first_pass(path: Path, options: LoadOptions) -> str | None:
    """Load the model in a new process, and compute a token; return why that failed, and None where it did not.

    None, too, where there can be no such process, where the model cannot be loaded, or where somebody killed it.
    """
    if not sys.executable:
        return None
    fields = {name: getattr(options, name) for name in SENT}
    layers = [(one.device, one.num_layers) for one in options.gpu_layers]
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input=json.dumps({"path": str(path), "layers": layers, **fields}),
            capture_output=True,
            text=True,
            timeout=TRY_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return signal_in_words(signal.SIGALRM)
    except OSError:
        return None
    if done.returncode < 0:
        return None if done.returncode == -signal.SIGKILL else signal_in_words(-done.returncode)
    return done.stdout.strip() or None


def main() -> None:
    """Compute a token of the model that standard input describes; print why that failed."""
    request: dict[str, Any] = json.load(sys.stdin)
    spec = read_spec(Path(request.pop("path")))
    layers = tuple(DeviceLayers(*one) for one in request.pop("layers"))
    options = replace(
        LoadOptions(context=KV_PADDING, batch_size=1, threads=1, gpu_layers=layers), **request
    )
    install_guarded_passes()
    try:
        model = GgufModel(spec, options)
    except LowtideError:
        return  # it is reported where the model is loaded
    try:
        model.forward((0,))
    except ForwardError as error:
        print(error)
