"""lowtide's attention inside llama.cpp's graph, on real models."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import write_model
from requantised import requantised
from sample_text import sample_text

from lowtide import Runtime
from lowtide.attention.bindings import llama_hook as llama_hook
from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.models.catalog import resolve
from lowtide.models.errors import LowtideError
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.gguf.model import GgufModel
from lowtide.models.gguf.parameters import LoadOptions

TEXT = sample_text()


@contextmanager
def hooked(
    path: Path,
    *,
    context: int = 1024,
    threads: int = 1,
    kv_type: str = "f16",
    batch_size: int = 128,
) -> Iterator[tuple[GgufModel, LlamaHook]]:
    hook = LlamaHook(threads)
    options = LoadOptions(
        context=context,
        batch_size=batch_size,
        threads=threads,
        kv_type=kv_type,
        eval_callback=hook.callback,
    )
    with GgufModel(read_spec(path), options) as model:
        yield model, hook
    hook.close()


def log_softmax(logits: Any) -> Any:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def logits_along(model: GgufModel, token_ids: list[int], start: int) -> Any:
    model.truncate(0)
    for at in range(0, start, model.batch_size):
        model.forward(token_ids[at : min(at + model.batch_size, start)])
    return np.array([model.forward([token]).copy() for token in token_ids[start:]])


def mean_kl(left: Any, right: Any) -> float:
    pairs = zip(map(log_softmax, left), map(log_softmax, right), strict=True)
    return float(np.mean([(np.exp(a) * (a - b)).sum() for a, b in pairs]))


def both_ways(path: Path, kv_type: str = "f16") -> tuple[Any, Any]:
    """Return the logits along a text under llama.cpp's attention and under lowtide's."""
    with hooked(path, kv_type=kv_type) as (model, hook):
        token_ids = model.tokenizer.encode(TEXT, add_special=True, parse_special=False)[:680]
        hook.set_active(False)
        llama_logits = logits_along(model, token_ids, 620)
        assert hook.counts().nodes_native == 0
        hook.set_active(True)
        lowtide_logits = logits_along(model, token_ids, 620)
        counts = hook.counts()
    assert (counts.layers_native, counts.layers_fallback) == (model.spec.num_layers, 0)
    assert counts.seconds > 0
    return llama_logits, lowtide_logits


@pytest.fixture(scope="module")
def exact(smollm2: Path) -> tuple[Any, Any]:
    return both_ways(smollm2)


def test_the_default_model_stays_at_the_noise_floor(exact: tuple[Any, Any]) -> None:
    """Another order of summation moves this model's distribution by 0.0036 nats."""
    llama_logits, lowtide_logits = exact
    assert 0 < mean_kl(llama_logits, lowtide_logits) <= 0.005


def test_without_8_bit_activations_only_rounding_differs(smollm2: Path, tmp_path: Path) -> None:
    llama_logits, lowtide_logits = both_ways(requantised(smollm2, tmp_path / "f16.gguf", "F16"))
    assert 0 < mean_kl(llama_logits, lowtide_logits) <= 5e-4


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_a_quantised_cache_is_read_as_exactly_as_by_llama_cpp(
    kv_type: str, exact: tuple[Any, Any], smollm2: Path
) -> None:
    """Rounding keys to few bits amplifies any change, so the distance from f16 is compared."""
    llama_logits, lowtide_logits = both_ways(smollm2, kv_type)
    assert mean_kl(exact[0], lowtide_logits) <= 1.15 * mean_kl(exact[0], llama_logits) + 0.002


def test_replaced_nodes_are_restored(smollm2: Path) -> None:
    """Graphs are reused from token to token: a replaced node must be restored."""
    with hooked(smollm2) as (model, hook):
        seen = {}
        for active in (False, True, False, True):
            hook.set_active(active)
            before = hook.counts().seconds
            model.truncate(0)
            seen.setdefault(active, set()).add(
                b"".join(model.forward([t]).tobytes() for t in range(5, 25))
            )
            assert (hook.counts().seconds > before) == active
    assert len(seen[True]) == len(seen[False]) == 1 and seen[True] != seen[False]


@pytest.mark.real
def test_sliding_windows_and_another_head_size() -> None:
    llama_logits, lowtide_logits = both_ways(resolve("gemma3-270m"))
    assert mean_kl(llama_logits, lowtide_logits) <= 0.02


def test_a_token_is_bitwise_the_same_in_any_batch_and_with_any_threads(smollm2: Path) -> None:
    """llama.cpp's own attention is not batch-invariant; exact speculation depends on this."""
    seen = set()
    for threads, batches in ((1, [1] * 24), (2, [1] * 24), (2, [2] * 12), (3, [8] * 3), (2, [24])):
        with hooked(smollm2, threads=threads) as (model, _hook):
            token_ids = model.tokenizer.encode(TEXT, add_special=True, parse_special=False)[:280]
            for at in range(0, 256, 128):
                model.forward(token_ids[at : at + 128])
            at = 256
            for rows in batches:
                logits = model.forward(token_ids[at : at + rows])
                at += rows
            seen.add(logits.tobytes())
    assert len(seen) == 1


def test_an_answer_of_the_runtime(smollm2: Path) -> None:
    with Runtime.open(smollm2, memory="8GiB", context=512, attention="dense") as runtime:
        result = runtime.generate("The tide is", max_tokens=8, temperature=0)
        assert (result.stats.layers_native, result.stats.layers) == (30, 30)
        rows = {row.component: row.num_bytes for row in runtime.plan.rows}
        counts = runtime._engine.kernel_counts()
        assert counts is not None and 0 < counts.scratch_bytes <= rows["attention scratch"]
    with Runtime.open(smollm2, memory="8GiB", context=512, reference=True) as runtime:
        assert runtime.generate("The tide is", max_tokens=2).stats.layers_native == 0


def test_the_scratch_stays_inside_the_plan_at_every_batch_size(smollm2: Path) -> None:
    from lowtide.memory.plan.estimates import attention_bytes

    for path in (smollm2, resolve("gemma3-270m")):
        with hooked(path, context=2048, threads=2) as (model, hook):
            for _ in range(15):
                model.forward([5] * 128)
            for rows in (1, 8, 9, 128):
                model.truncate(1900)
                model.forward([5] * rows)
            assert hook.counts().scratch_bytes <= attention_bytes(model.spec, 2048, 2)


def test_an_unsupported_head_size_is_left_to_llama_cpp(tmp_path: Path) -> None:
    path = write_model(tmp_path / "narrow.gguf", width=32, heads=4, kv_heads=2)
    with hooked(path) as (model, hook):
        assert np.isfinite(model.forward([5, 6, 7])).all()
        counts = hook.counts()
    assert (counts.layers_native, counts.layers_fallback) == (0, 2)


def test_two_models_in_two_threads_do_not_disturb_each_other(smollm2: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other.gguf", width=128, heads=2, kv_heads=1)

    def run(path: Path, into: list[bytes]) -> None:
        with hooked(path, threads=1) as (model, hook):
            for token in range(5, 45):
                into.append(model.forward([token]).tobytes())
            assert hook.counts().layers_fallback == 0

    alone: list[list[bytes]] = [[], []]
    together: list[list[bytes]] = [[], []]
    for path, into in zip((smollm2, other), alone, strict=True):
        run(path, into)
    threads = [
        threading.Thread(target=run, args=pair)
        for pair in zip((smollm2, other), together, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_another_ggml_abi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = llama_hook.ggml_functions()
    wrong = type(real)(*(getattr(real, f[0]) for f in real._fields_))
    # A function that answers with a tensor of another shape stands for another layout.
    wrong.view_tensor = real.set_name
    maker = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(lambda _c, t: t)
    wrong.view_tensor = ctypes.cast(maker, ctypes.c_void_p).value
    monkeypatch.setattr(llama_hook, "ggml_functions", lambda: wrong)
    with pytest.raises(LowtideError, match="another layout.*attention='llama'"):
        LlamaHook(2)


def test_tensors_on_a_device_are_left_to_llama_cpp(
    monkeypatch: pytest.MonkeyPatch, smollm2: Path
) -> None:
    real = llama_hook.ggml_functions()
    elsewhere = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(lambda _buffer: False)
    changed = type(real)(*(getattr(real, f[0]) for f in real._fields_))
    changed.backend_buffer_is_host = ctypes.cast(elsewhere, ctypes.c_void_p).value
    monkeypatch.setattr(llama_hook, "ggml_functions", lambda: changed)
    with Runtime.open(smollm2, memory="4GiB", context=512, threads=1, attention="dense") as runtime:
        stats = runtime.generate("The sea is", max_tokens=2, temperature=0).stats
    assert (stats.layers_native, stats.layers) == (0, 30)


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(LowtideError, match="no such kernels"):
        LlamaHook(2, "cray")


@pytest.mark.parametrize("kernels", ["avx2", "portable"])
def test_other_kernel_sets_in_the_graph(kernels: str, smollm2: Path) -> None:
    from lowtide.attention.bindings.library import usable_kernel_sets

    if kernels not in usable_kernel_sets():
        pytest.skip(f"this processor has no {kernels}")
    hook = LlamaHook(2, kernels)
    assert hook.kernels == kernels
    options = LoadOptions(context=256, batch_size=64, threads=2, eval_callback=hook.callback)
    with GgufModel(read_spec(smollm2), options) as model:
        assert np.isfinite(model.forward([5] * 40)).all()
        assert hook.counts().layers_native == 30
    hook.close()
