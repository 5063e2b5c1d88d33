"""Execution providers by short names: what is installed is taken, what is not is an error that helps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from onnx_decoders import write_decoder

from lowtide import Runtime
from lowtide.models.errors import BadOption
from lowtide.models.onnx import config as providers
from lowtide.models.onnx.config import provider_name, session_providers


def test_the_processor_is_always_there() -> None:
    assert provider_name("cpu") == provider_name("CPU") == "CPUExecutionProvider"
    assert session_providers("cpu") == ["CPUExecutionProvider"]


def test_another_one_leaves_the_rest_to_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["CUDAExecutionProvider", "CoreMLExecutionProvider", "CPUExecutionProvider"]
    library = SimpleNamespace(__version__="1", get_available_providers=lambda: names)
    monkeypatch.setattr(providers, "onnx_library", lambda name: library)
    assert session_providers("cuda") == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert provider_name("coreml") == "CoreMLExecutionProvider"
    with pytest.raises(BadOption, match="'qnn', and onnxruntime 1 has coreml, cpu, cuda here"):
        provider_name("qnn")


def test_one_that_is_not_installed_is_refused(tmp_path: Path, smollm2: Path) -> None:
    folder = write_decoder(tmp_path / "tiny")
    with pytest.raises(BadOption, match=r"provider is 'qnn', and onnxruntime .* has .*cpu.* here"):
        Runtime.open(folder, memory="2GiB", provider="qnn")
    with pytest.raises(BadOption, match="for ONNX models.*--gpu-layers"):
        Runtime.open(smollm2, memory="2GiB", provider="cuda")
    with Runtime.open(folder, memory="2GiB", provider="CPU", threads=1) as runtime:
        assert runtime.generate("a", max_tokens=2, temperature=0).token_ids
