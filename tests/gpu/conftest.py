"""Fixtures of the tests on a real device, which `make test-gpu` runs: whatever llama.cpp is found, with its devices.

Each test skips where that llama.cpp finds no device. `tests/gpu/bring_vulkan.sh` brings a software one.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_files import write_model

from lowtide.models.errors import LowtideError
from lowtide.models.facts.store import SETTLED_S
from lowtide.models.gguf.gpu import GpuDevice, read_gpu_devices
from lowtide.models.gguf.llama_cpp import llama_library

NO_DEVICE = (
    "this llama.cpp finds no device: tests/gpu/bring_vulkan.sh brings a software one for make test-gpu, and "
    "LLAMA_CPP_LIB_PATH names another llama.cpp"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


def pytest_report_header() -> list[str]:
    """Say what the tests run on, where they are named on the command line."""
    try:
        devices, library = read_gpu_devices(), llama_library().file
    except LowtideError as error:
        return [f"devices: none, because {error}"]
    found = [f"{one.name} is {one.description}" for one in devices]
    return [f"devices of {library}: {'; '.join(found) or 'none'}; {platform.platform()}"]


@pytest.fixture(scope="session")
def _devices() -> tuple[GpuDevice, ...]:
    return read_gpu_devices()


@pytest.fixture(autouse=True)
def devices(_devices: tuple[GpuDevice, ...]) -> tuple[GpuDevice, ...]:
    """The devices that llama.cpp finds; the test is skipped where there are none."""
    if not _devices:
        pytest.skip(NO_DEVICE)
    return _devices


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep chats apart, and let all tests share what is measured of the driver once: it takes a while."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture(scope="session", autouse=True)
def _compiled_shaders() -> Iterator[None]:
    """Let Mesa keep compiled shaders for the next run: compiling them takes longer than the tests."""
    folder = Path(__file__).parents[2] / "build" / "shaders"
    with pytest.MonkeyPatch.context() as patch:
        if "MESA_SHADER_CACHE_DIR" not in os.environ:
            patch.setenv("MESA_SHADER_CACHE_DIR", str(folder))
        yield


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with four layers, small enough for a software device."""
    path = tmp_path_factory.mktemp("models") / "small.gguf"
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    shape = {"layers": 4, "width": 256, "heads": 4, "kv_heads": 2, "feed_forward": 512}
    write_model(path, **shape, quantised="Q4_0", chat_template=template)
    time.sleep(SETTLED_S + 0.1)  # nothing is stored of a file that has just changed
    return path
