"""Layouts are asked of llama.cpp once, and give the same plan when they are read again."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import pytest
from gguf_files import write_model

from lowtide.memory.budget import Budget
from lowtide.memory.units import MIB
from lowtide.models.facts import store
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.spec import ModelSpec
from lowtide.runtime.backends import gguf_baseline
from lowtide.runtime.backends.kernels import layouts
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.planning.expected import ExpectedPrompt
from lowtide.runtime.planning.plan import LoadConfig, plan_spec


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled, and this process as one in which llama.cpp was not loaded."""
    monkeypatch.setattr(store, "SETTLED_S", -3600.0)
    monkeypatch.setattr(gguf_baseline, "_is_fresh", lambda _memory: True)


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The models that llama.cpp laid out, in order."""
    models: list[Path] = []

    class Counted(layouts.SimulatedGguf):
        def __init__(self, spec: ModelSpec) -> None:
            models.append(spec.path)
            super().__init__(spec)

    monkeypatch.setattr(layouts, "SimulatedGguf", Counted)
    return models


def _sizes(path: Path, **options: object) -> dict[str, int]:
    """Return the planned bytes of each component that does not depend on what else is in this process."""
    config = LoadConfig.of(memory="8GiB", **options)
    plan = plan_spec(read_spec(path), config).plan
    return {row.component: row.num_bytes for row in plan.rows if "interpreter" not in row.component}


def test_a_second_plan_lays_nothing_out(tmp_path: Path, laid_out: list[Path]) -> None:
    path = write_model(tmp_path / "model.gguf", context=4096)
    first = _sizes(path)
    assert laid_out == [path]
    assert _sizes(path) == first
    assert laid_out == [path]


def test_another_context_is_laid_out_when_it_is_asked_for(
    tmp_path: Path, laid_out: list[Path]
) -> None:
    path = write_model(tmp_path / "model.gguf", context=4096)
    _sizes(path, context=512)
    longer = _sizes(path, context=4096)
    assert len(laid_out) == 2
    assert _sizes(path, context=4096) == longer
    assert len(laid_out) == 2


def test_a_changed_model_or_setting_is_laid_out_again(
    tmp_path: Path, laid_out: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "model.gguf")
    small = _sizes(path)
    write_model(path, vocabulary=3000)
    assert _sizes(path) != small
    assert len(laid_out) == 2
    monkeypatch.setenv("GGML_LOWTIDE_TEST", "1")
    _sizes(path)
    assert len(laid_out) == 3


def test_what_a_program_measured_beside_its_own_memory_is_not_stored(
    tmp_path: Path, laid_out: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "model.gguf")
    monkeypatch.setattr(gguf_baseline, "_is_fresh", lambda _memory: False)
    _sizes(path)
    _sizes(path)
    assert len(laid_out) == 2


def test_without_a_cache_folder_everything_is_laid_out(
    tmp_path: Path, laid_out: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "facts_folder", lambda: None)
    path = write_model(tmp_path / "model.gguf")
    assert _sizes(path).keys() == _sizes(path).keys()
    assert len(laid_out) == 2


def test_stored_values_of_another_shape_are_ignored(tmp_path: Path, laid_out: list[Path]) -> None:
    path = write_model(tmp_path / "model.gguf")
    _sizes(path)
    spec = read_spec(path)
    facts = layouts.Layouts(spec, after_template=True)._facts
    for values in (
        [],
        {"contexts": 1},
        {"contexts": [[1]]},
        {"measured": [1, "robot"], "contexts": []},
    ):
        facts.write(values, [path])
        _sizes(path)
    assert len(laid_out) == 5


def test_a_prompt_is_counted_where_the_plan_depends_on_it(
    tmp_path: Path, laid_out: list[Path]
) -> None:
    path = write_model(tmp_path / "model.gguf", context=65536, layers=8, width=256, kv_heads=4)
    spec = read_spec(path)
    prompt = ExpectedPrompt(params=SamplingParams(max_tokens=4), text="word " * 2000)
    roomy = plan_spec(spec, LoadConfig(memory="8GiB"), prompt=prompt)
    assert not roomy.plan.downgrades and roomy.baseline.prompt_tokens == 0
    tight_bytes = roomy.plan.total_bytes - (100 << 20)
    tight = plan_spec(spec, LoadConfig(memory=tight_bytes), prompt=prompt)
    assert tight.plan.downgrades and tight.baseline.prompt_tokens > 2000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap cannot be trimmed")
def test_what_a_template_leaves_free_is_not_in_the_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "model.gguf")
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    used: list[int] = []

    def leave_free(_spec: ModelSpec, _budget: Budget) -> int:
        *freed, last = [libc.malloc(16 << 10) for _ in range(1024)]
        for block in freed:
            ctypes.memset(block, 1, 16 << 10)
            libc.free(block)
        used.append(last)  # the end of the heap: without it, free itself would return the pages
        return 0

    baseline = plan_spec(read_spec(path), LoadConfig(memory="8GiB")).baseline
    monkeypatch.setattr(gguf_baseline, "_compile_template", leave_free)
    after = plan_spec(read_spec(path), LoadConfig(memory="8GiB")).baseline
    libc.free(used.pop())
    assert after.interpreter_bytes < baseline.interpreter_bytes + 4 * MIB


def test_a_text_and_a_chat_are_measured_apart(tmp_path: Path, laid_out: list[Path]) -> None:
    """Compiling a template leaves room in the heap, which the vocabulary takes."""
    spec = read_spec(write_model(tmp_path / "model.gguf", chat_template="{{ messages }}"))
    params = SamplingParams(max_tokens=1)
    text = ExpectedPrompt(params=params, text="hi")
    chat = ExpectedPrompt(params=params, messages=[{"role": "user", "content": "hi"}])
    for prompt in (text, chat, text, chat):
        plan_spec(spec, LoadConfig(memory="8GiB"), prompt=prompt)
    assert len(laid_out) == 2
