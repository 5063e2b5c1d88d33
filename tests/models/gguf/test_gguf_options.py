"""Parameters for llama.cpp, with made-up devices; nothing is loaded."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import pytest

from lowtide.models.gguf import parameters
from lowtide.models.gguf.gpu import cpu_buffer_type
from lowtide.models.gguf.llama_cpp import llama_library
from lowtide.models.gguf.parameters import (
    DeviceLayers,
    LoadOptions,
    context_parameters,
    model_parameters,
)

LAYERS = (DeviceLayers("CUDA0", 20), DeviceLayers("CUDA1", 11))


@pytest.fixture(autouse=True)
def _addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "device_address", lambda name: 1000 + int(name[-1]))


def pointers(address: int, count: int) -> list[int | None]:
    return list((ctypes.c_void_p * count).from_address(address))


def patterns(params: Any) -> list[re.Pattern[str]]:
    """Return the patterns of tensors that stay on the CPU."""
    overrides = (parameters._Override * 2).from_address(params.tensor_buft_overrides)
    assert overrides[1].pattern is None and overrides[0].buffer_type == cpu_buffer_type()
    return [re.compile(overrides[0].pattern.decode())]


def test_without_layers_no_device_is_started() -> None:
    params = model_parameters(llama_library().api, memory_map=True, repack=True)
    assert params.n_gpu_layers == 0 and not params.tensor_split
    assert pointers(params.devices, 1) == [None]
    assert params.tensor_buft_overrides is None


def test_layers_go_to_the_devices_as_counted() -> None:
    params = model_parameters(llama_library().api, memory_map=False, repack=True, gpu_layers=LAYERS)
    assert params.n_gpu_layers == 31
    assert pointers(params.devices, 3) == [1000, 1001, None]
    assert params.tensor_split[:3] == [20.0, 11.0, 0.0]
    (pattern,) = patterns(params)
    assert not pattern.search("blk.3.attn_output.weight")


def test_the_matrix_behind_native_attention_stays_on_the_cpu() -> None:
    params = model_parameters(
        llama_library().api,
        memory_map=False,
        repack=True,
        gpu_layers=LAYERS,
        gpu_attention=False,
    )
    (pattern,) = patterns(params)
    assert pattern.search("blk.3.attn_output.weight") and not pattern.search("blk.3.attn_q.weight")


@pytest.mark.parametrize("on_gpu", [True, False])
def test_the_kv_cache_is_where_attention_is(on_gpu: bool) -> None:
    options = LoadOptions(context=64, batch_size=1, threads=1, gpu_attention=on_gpu)
    params = context_parameters(llama_library().api, options)
    assert params.offload_kqv is on_gpu and params.op_offload is False
