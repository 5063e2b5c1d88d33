"""The comparison of lowtide's kernels with llama.cpp's: it covers the model, is stored, and stays inside its memory."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import pytest
from gguf_files import write_model

from lowtide.attention import calibration
from lowtide.attention.bindings.ggml_graph import GgmlGraph, _call, _InitParams
from lowtide.memory.budget import Budget
from lowtide.memory.process import read_process_memory
from lowtide.memory.units import GIB
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.gguf.llama_cpp import llama_library
from lowtide.models.spec import ModelSpec
from lowtide.runtime.backends.kernels import kernel_times
from lowtide.runtime.backends.kernels.kernel_choice import KernelChoice
from lowtide.runtime.backends.kernels.kernel_times import (
    MOST_BYTES,
    KernelTimes,
    measure,
    measured_choice,
)

BOTH = KernelChoice(attention=True, repack=True)
ENOUGH = Budget(num_bytes=64 * GIB, source="a test")


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    llama_library()
    path = write_model(
        tmp_path / "m.gguf", width=256, feed_forward=512, quantised="Q4_K", halves=("ffn_down",)
    )
    return read_spec(path)


def test_every_type_and_attention_are_timed_within_the_memory(spec: ModelSpec) -> None:
    before = read_process_memory().peak_bytes
    found = measure(spec)
    assert found.unhooked_reason is None
    assert set(found.seconds) == {
        f"{what}, {tokens} tokens"
        for what in ("matmul Q4_K", "matmul F16", "attention")
        for tokens in (1, 32)
    }
    assert all(0 < own < 10 and 0 < others < 10 for own, others in found.seconds.values())
    assert read_process_memory().peak_bytes - before <= MOST_BYTES


def test_it_is_measured_once(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[ModelSpec] = []

    def slow(of: ModelSpec) -> KernelTimes:
        calls.append(of)
        return KernelTimes({"attention, 1 tokens": (2.0, 1.0), "matmul Q4_K, 1 tokens": (1.0, 1.0)})

    monkeypatch.setattr(kernel_times, "measure", slow)
    first, second = (measured_choice(spec, BOTH, ENOUGH) for _ in range(2))
    assert first == second and len(calls) == 1
    assert (first.attention, first.repack) == (False, True)
    assert first.reason == "lowtide's attention takes 2.00 times as long as llama.cpp's here"
    folder = calibration.calibration_folder()
    assert folder is not None
    [stored] = folder.glob("kernel-times-*.json")
    for damaged in ("{", "[]", '{"seconds": {"attention": [0, 1]}, "unhooked_reason": null}'):
        stored.write_text(damaged)
        assert measured_choice(spec, BOTH, ENOUGH) == first
    assert len(calls) == 4


def test_what_another_process_measured_first_stays(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that open a model for the first time together compute with the same kernels."""

    def with_another(of: ModelSpec) -> KernelTimes:
        monkeypatch.setattr(kernel_times, "measure", lambda _: KernelTimes({}))
        others.append(measured_choice(of, BOTH, ENOUGH))
        return KernelTimes({"attention, 1 tokens": (2.0, 1.0)})

    others: list[KernelChoice] = []
    monkeypatch.setattr(kernel_times, "measure", with_another)
    assert measured_choice(spec, BOTH, ENOUGH) == others[0] == BOTH
    assert measured_choice(spec, BOTH, ENOUGH) == BOTH


def test_weights_are_known_at_the_address_of_an_earlier_graphs_tensor(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs lie where others lay before, as allocators do it now and then: the first attention's comes in between."""
    memory = ctypes.create_string_buffer(3 * MOST_BYTES)
    pairs = [(0, 2)] * 2 + [(1, 2)] * 4  # where lowtide's graphs and llama.cpp's are
    places = iter([place * MOST_BYTES for pair in pairs for place in pair])

    def new_context(_num_bytes: int) -> int:
        begin = ctypes.addressof(memory) + next(places)
        params = _InitParams(MOST_BYTES, begin, False)
        made: int = _call("ggml_init", ctypes.c_void_p, (_InitParams, params))
        return made

    monkeypatch.setattr(GgmlGraph, "_new_context", staticmethod(new_context))
    assert all(math.isfinite(own) for own, _ in measure(spec).seconds.values())


def test_a_budget_without_room_is_not_measured(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_times, "measure", lambda _spec: pytest.fail("measured"))
    small = Budget(num_bytes=read_process_memory().resident_bytes, source="a test")
    assert measured_choice(spec, BOTH, small) == BOTH


def test_shapes_that_the_kernels_do_not_know_are_left_to_llama_cpp() -> None:
    times = KernelTimes({"attention, 1 tokens": (float("inf"), 1.0)})
    choice = times.apply(BOTH)
    assert not choice.attention and choice.repack
    assert choice.reason == "lowtide's attention does not know the shapes of this model"
