"""What a plan with a device asks of llama.cpp. The device is made up, so nothing is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gpus import gpu

from lowtide import Runtime
from lowtide.models.errors import ModelError
from lowtide.models.gguf.model import DeviceLayers, LoadOptions


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[LoadOptions]:
    """The options of every model that would be loaded, beside a device of 110 MiB and one of 1 GiB."""
    wanted: list[LoadOptions] = []

    def load(_spec: Any, options: LoadOptions) -> None:
        wanted.append(options)
        raise ModelError("nothing is loaded here")

    devices = (gpu("A", 110), gpu("B", 1000))
    monkeypatch.setattr("lowtide.models.gguf.gpu.read_gpu_devices", lambda: devices)
    monkeypatch.setattr("lowtide.runtime.loading.gguf.GgufModel", load)
    return wanted


@pytest.mark.parametrize(("attention", "there"), [("llama", True), ("dense", False)])
def test_layers_are_loaded_where_they_are_planned(
    asked: list[LoadOptions], smollm2: Path, attention: str, there: bool
) -> None:
    with pytest.raises(ModelError, match="nothing is loaded"):
        Runtime.open(smollm2, memory="2GiB", context=1024, attention=attention, gpu_layers="auto")
    (options,) = asked
    first, second = options.gpu_layers
    assert isinstance(first, DeviceLayers) and (first.device, second.device) == ("A", "B")
    assert first.num_layers + second.num_layers == 31
    assert options.gpu_attention is there and not options.memory_map and options.repack


def test_without_layers_nothing_goes_to_a_device(asked: list[LoadOptions], smollm2: Path) -> None:
    with pytest.raises(ModelError, match="nothing is loaded"):
        Runtime.open(smollm2, memory="2GiB", context=1024)
    assert asked[0].gpu_layers == () and asked[0].memory_map
