"""What a plan with GPUs requests from llama.cpp. The devices are made up, so nothing is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gpus import gpu

from lowtide import Runtime
from lowtide.models.errors import ModelError
from lowtide.models.gguf.parameters import DeviceLayers, LoadOptions


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> list[LoadOptions]:
    """Return the options of every model that would be loaded, with devices of 110 MiB and of 1 GiB."""
    options_of_models: list[LoadOptions] = []

    def load(_spec: Any, options: LoadOptions, _kernels: Any) -> None:
        options_of_models.append(options)
        raise ModelError("nothing is loaded here")

    devices = (gpu("A", 110), gpu("B", 1000))
    monkeypatch.setattr("lowtide.models.gguf.gpu.read_gpu_devices", lambda: devices)
    monkeypatch.setattr("lowtide.runtime.backends.gguf.GgufModel", load)
    return options_of_models


@pytest.mark.parametrize(("attention", "on_gpu"), [("llama", True), ("dense", False)])
def test_layers_are_loaded_where_they_are_planned(
    requested: list[LoadOptions], smollm2: Path, attention: str, on_gpu: bool
) -> None:
    with pytest.raises(ModelError, match="nothing is loaded"):
        Runtime.open(smollm2, memory="2GiB", context=1024, attention=attention, gpu_layers="auto")
    (options,) = requested
    first, second = options.gpu_layers
    assert isinstance(first, DeviceLayers) and (first.device, second.device) == ("A", "B")
    assert first.num_layers + second.num_layers == 31
    assert options.gpu_attention is on_gpu and not options.memory_map and options.repack


def test_without_layers_nothing_goes_to_a_device(
    requested: list[LoadOptions], smollm2: Path
) -> None:
    with pytest.raises(ModelError, match="nothing is loaded"):
        Runtime.open(smollm2, memory="2GiB", context=1024)
    assert requested[0].gpu_layers == () and requested[0].memory_map
