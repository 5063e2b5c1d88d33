"""Execution providers by short names; one that is not installed is an error that lists those that are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from onnx_decoders import write_decoder

from lowtide import Runtime
from lowtide.models.errors import BadOption
from lowtide.models.onnx import config as providers
from lowtide.models.onnx.config import provider_name, session_providers


def test_the_cpu_is_always_available() -> None:
    assert provider_name("cpu") == provider_name("CPU") == "CPUExecutionProvider"
    assert session_providers("cpu") == ["CPUExecutionProvider"]


def test_any_other_provider_falls_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["CUDAExecutionProvider", "CoreMLExecutionProvider", "CPUExecutionProvider"]
    library = SimpleNamespace(__version__="1", get_available_providers=lambda: names)
    monkeypatch.setattr(providers, "onnx_library", lambda name: library)
    assert session_providers("cuda") == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert provider_name("coreml") == "CoreMLExecutionProvider"
    with pytest.raises(BadOption, match="'qnn', but onnxruntime 1 here has only coreml, cpu, cuda"):
        provider_name("qnn")


def test_a_provider_that_is_not_installed_is_refused(tmp_path: Path, smollm2: Path) -> None:
    folder = write_decoder(tmp_path / "tiny")
    with pytest.raises(
        BadOption, match=r"provider is 'qnn', but onnxruntime .* here has only .*cpu"
    ):
        Runtime.open(folder, memory="2GiB", provider="qnn")
    with pytest.raises(BadOption, match="ONNX models.*gpu_layers"):
        Runtime.open(smollm2, memory="2GiB", provider="cuda")
    with Runtime.open(folder, memory="2GiB", provider="CPU", threads=1) as runtime:
        assert runtime.generate("a", max_tokens=2, temperature=0).token_ids
