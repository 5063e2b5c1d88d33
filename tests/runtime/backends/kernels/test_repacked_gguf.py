"""GGUF models that run from a repacked copy: answers within rounding; invalid copies are made again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import write_model
from processes import run_lowtide
from requantised import FILE_TYPES, requantised

from lowtide import Runtime
from lowtide.memory.units import MIB
from lowtide.models.errors import BadModelFile, BadOption
from lowtide.models.gguf.header.spec import read_spec
from lowtide.runtime.backends.kernels import repack_in_memory
from lowtide.runtime.backends.kernels.copies import SOURCES
from lowtide.runtime.backends.kernels.repack import repacked_gguf, repacked_path
from lowtide.runtime.errors import CannotRepack
from lowtide.runtime.generation.result import GenerationResult
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

FORMATS = [name for name in FILE_TYPES if name != "F32"]
PROGRAM = "from lowtide.cli.main import run; run()"
PROMPT = tuple(range(5, 75))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same random model in every format; two layers, so that the K formats have whole blocks."""
    folder = tmp_path_factory.mktemp("models")
    source = write_model(
        folder / "F32.gguf", width=256, heads=4, kv_heads=2, feed_forward=512, context=512
    )
    return {name: requantised(source, folder / f"{name}.gguf", name) for name in FORMATS}


def logits(path: Path, *, repack: bool, **options: Any) -> np.ndarray:
    """Return logits after a prompt of two batches and after another token, (2, vocabulary).

    Attention is llama.cpp's, unless `options` say otherwise: only the matmuls differ.
    """
    options = {"attention": "llama", **options}
    loaded = Engine(
        plan_reference(path, LoadConfig(repack=repack, memory="2GiB", threads=2, **options))
    )
    try:
        model = loaded.model
        model.forward(PROMPT[:32])
        rows = [model.forward(some).copy() for some in (PROMPT[32:], (9,))]
        about = loaded.generation_context()
        assert bool(about.repacked_tensors) == repack and about.not_repacked_reason is None
        if repack:
            counts = loaded._loaded._callback.counts()  # type: ignore[union-attr]
            assert counts.matmuls_repacked > 0 and counts.repacked_refused == 0
        return np.stack(rows)
    finally:
        loaded.close()


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_as_close_to_exact_ones_as_llama_cpps(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Exact are the same weights in float32. Both round activations to 8 bits; for F16 and BF16 only llama.cpp."""
    exact = logits(requantised(models[name], tmp_path / "F32.gguf", "F32"), repack=False)
    llama, native = (logits(models[name], repack=repack) - exact for repack in (False, True))
    assert 0 < np.sqrt((native**2).mean()) < 1.25 * np.sqrt((llama**2).mean())
    assert np.sqrt((native**2).mean()) < 0.03 * exact.std()


@pytest.mark.parametrize("name", ["Q4_1", "F16", "BF16"])
def test_batches_and_threads_change_nothing(name: str, models: dict[str, Path]) -> None:
    expected = logits(models[name], repack=True, attention="dense")
    for threads in (1, 2):
        loaded = Engine(
            plan_reference(
                models[name],
                LoadConfig(repack=True, memory="2GiB", threads=threads, attention="dense"),
            )
        )
        try:
            loaded.model.forward(PROMPT[:17])
            loaded.model.forward(PROMPT[17:])
            assert np.array_equal(loaded.model.forward((9,)), expected[1])
        finally:
            loaded.close()


@pytest.mark.parametrize("attention", ["dense", "llama"])
def test_matmuls_of_the_same_activations_are_one_step(
    attention: str, models: dict[str, Path]
) -> None:
    """In a layer: Q, K and V; the output; gate and up; down. Then the output matrix, which is looked up first."""
    config = LoadConfig(repack=True, memory="2GiB", threads=2, attention=attention)
    loaded = Engine(plan_reference(models["Q4_0"], config))
    try:
        for token_ids in (PROMPT[:20], (5,), (6,)):
            before = loaded._loaded._callback.counts()  # type: ignore[union-attr]
            loaded.model.forward(token_ids)
            after = loaded._loaded._callback.counts()  # type: ignore[union-attr]
            layers = loaded.model.spec.num_layers
            assert after.matmul_steps - before.matmul_steps == 4 * layers + 1
            assert after.matmuls_repacked - before.matmuls_repacked >= 7 * layers + 1
    finally:
        loaded.close()


def test_matrices_of_different_types_read_their_own_activations(tmp_path: Path) -> None:
    """Matmuls of F16 read fp32 activations, and those of Q4_0 beside them 8-bit ones."""
    mixed = write_model(
        tmp_path / "m.gguf", quantised="Q4_0", halves=("attn_q", "attn_v", "ffn_up")
    )
    llama, native = (logits(mixed, repack=repack) for repack in (False, True))
    assert 0 < np.abs(native - llama).max() < 0.05 * llama.std()


def test_answers_are_the_same_before_and_after_a_batch(models: dict[str, Path]) -> None:
    """The batch's context is freed with its graph: the kernels must not read unmapped pages."""
    code = f"""
from lowtide import Runtime
options = dict(memory="2GiB", repack=True, attention="dense", threads=2)
with Runtime.open({str(models["Q4_1"])!r}, **options) as runtime:
    alone, again = [], []
    for answers in (alone, again):
        answers += [runtime.generate(p, max_tokens=6, temperature=0).token_ids for p in ("a b", "c")]
        together = runtime.generate_batch(["a b", "c"], max_tokens=6, temperature=0)
        assert [r.token_ids for r in together] == answers, (together, answers)
        runtime._session.clear()
    assert alone == again
"""
    unmapped = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}
    subprocess.run([sys.executable, "-c", code], check=True, env=unmapped, timeout=120)


def test_the_default_model_answers(smollm2: Path) -> None:
    with Runtime.open(smollm2, memory="1GiB", context=512, repack=True, threads=1) as runtime:
        messages = [{"role": "user", "content": "Why is the sea salty?"}]
        result = GenerationResult.of(runtime.chat(messages, max_tokens=12, temperature=0))
    assert result.text.startswith("The sea is salty because")
    assert result.stats.repacked_tensors == 211 and result.stats.not_repacked_reason is None


def test_a_budget_below_the_file_streams_repacked_weights(smollm2: Path, tmp_path: Path) -> None:
    """The answers are the same, and the peak is under the budget."""
    options = (
        "-p",
        "Why is the sea salty?",
        "-n",
        "4",
        "--temp",
        "0",
        "-c",
        "512",
        "-t",
        "1",
        "--repack",
    )
    resident = run_lowtide("run", str(smollm2), "--memory", "1GiB", *options)
    streamed = run_lowtide("run", str(smollm2), "--memory", "105MiB", *options)
    if streamed.code == 2:  # libraries need more on some systems
        bound = streamed.stderr.split("raise --memory to ")[1].split(",")[0]
        streamed = run_lowtide("run", str(smollm2), "--memory", bound, *options)
    assert streamed.code == resident.code == 0, streamed.stderr
    assert "reduced to fit: weights: streamed" in streamed.stderr
    assert streamed.stdout == resident.stdout
    assert streamed.peak_bytes <= 115 * MIB


def test_a_copy_is_made_once_and_again_where_it_is_invalid(models: dict[str, Path]) -> None:
    spec = read_spec(models["Q4_0"])
    repacked = repacked_gguf(spec)
    first = repacked.path.stat()
    assert (repacked.name, repacked.fingerprint) == (spec.name, spec.fingerprint)
    assert repacked_gguf(spec).path.stat().st_ino == first.st_ino
    whole = repacked.path.read_bytes()
    for broken in (whole[:-1], whole[:100], b"", whole[:-200] + bytes(200)):
        repacked.path.write_bytes(broken)
        assert repacked_gguf(spec).path.read_bytes() == whole
    foreign = repacked_gguf(read_spec(models["Q4_1"]))
    os.replace(foreign.path, repacked.path)
    assert repacked_gguf(spec).path.read_bytes() == whole


def test_a_copy_is_not_opened_as_a_model(models: dict[str, Path]) -> None:
    """llama.cpp would misread its bytes."""
    path = repacked_gguf(read_spec(models["Q4_0"])).path
    for options in ({"attention": "dense"}, {"repack": True}, {"gpu_layers": 1}):
        with pytest.raises(BadModelFile, match="is a repacked copy, which repack finds by itself"):
            Runtime.open(path, memory="1GiB", **options)  # type: ignore[arg-type]
    with pytest.raises(BadModelFile, match="is a repacked copy"):
        Runtime.open(models["Q4_0"], memory="1GiB", speculate=str(path))


def test_a_changed_model_has_another_copy(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", quantised="Q4_0")
    first = repacked_gguf(read_spec(path)).path
    write_model(path, quantised="Q4_0", vocabulary=336)
    assert repacked_gguf(read_spec(path)).path != first


def test_parts_of_a_split_model_keep_their_numbers() -> None:
    assert repacked_path(Path("m-00002-of-00003.gguf"), "abc").name == "abc-00002-of-00003.gguf"
    assert repacked_path(Path("m.gguf"), "abc").name == "abc.gguf"


def test_two_processes_repack_the_same_model(models: dict[str, Path]) -> None:
    commands = [[sys.executable, "-c", PROGRAM, "models", "repack", str(models["Q4_1"])]] * 2
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True) for c in commands]
    paths = {process.communicate(timeout=300)[0].strip() for process in running}
    assert len(paths) == 1
    path = Path(paths.pop())
    assert [p for p in path.parent.iterdir() if p.suffix != SOURCES] == [path]


def test_a_model_that_cannot_be_repacked_runs_and_says_why(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = write_model(tmp_path / "m.gguf")
    with pytest.raises(CannotRepack, match="none of the matrices"):
        repacked_gguf(read_spec(plain))
    with Runtime.open(plain, memory="1GiB", repack=True) as runtime:
        assert "none of the matrices" in str(
            runtime.generate("a", max_tokens=2).stats.not_repacked_reason
        )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("a file instead of a folder")
    with Runtime.open(models["Q4_0"], memory="1GiB", repack=True) as runtime:
        stats = runtime.generate("a", max_tokens=2).stats
    assert stats.repacked_tensors and stats.not_repacked_reason is None, "in memory"
    monkeypatch.setattr(repack_in_memory.sys, "platform", "another")
    with pytest.raises(CannotRepack, match="cannot be written"):
        repack_in_memory.repacked_while_loading(runtime.spec)


def test_repacking_and_gpus_exclude_each_other() -> None:
    with pytest.raises(BadOption, match="repack is for matmuls on the CPU"):
        LoadConfig(repack=True, gpu_layers=3)
