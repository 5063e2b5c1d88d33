"""Single attention nodes against llama.cpp's kernel: variants that no model here has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from ggml_graph import AttentionGraph
from reference import attention, quantise_q4_0, quantise_q8_0

from lowtide.attention.bindings.llama_hook import LlamaHook


@pytest.fixture
def hook() -> Iterator[LlamaHook]:
    made = LlamaHook(threads=2)
    yield made
    made.close()


class Inputs:
    """Random q, k, v and mask for `streams` streams, and the oracle's result."""

    def __init__(
        self,
        *,
        streams: int = 1,
        rows: int = 3,
        heads: int = 6,
        kv_heads: int = 2,
        size: int = 64,
        keys: int = 300,
        kv_type: str = "f16",
    ) -> None:
        random = np.random.default_rng(5)
        self.size, self.kv_type = size, kv_type
        self.q = random.standard_normal((streams, heads, rows, size), dtype=np.float32)
        values = random.standard_normal((2, streams, kv_heads, keys, size), dtype=np.float32)
        if kv_type == "f16":
            stored = values.astype(np.float16)
            meant = stored.astype(np.float64)
        else:
            stored, meant = (quantise_q8_0 if kv_type == "q8_0" else quantise_q4_0)(values)
        (self.k, self.v), (self._k, self._v) = stored, meant
        hidden = random.random((streams, rows, keys)) < 0.3
        self.mask = np.where(hidden, -np.inf, 0).astype(np.float16)

    def graph(self, **options: Any) -> AttentionGraph:
        options = {"scale": 0.125, "size": self.size, "kv_type": self.kv_type, **options}
        return AttentionGraph(self.q, self.k, self.v, self.mask, **options)

    def expected(self, **options: Any) -> Any:
        options = {"scale": 0.125, **options}
        return np.stack(
            [
                attention(q.swapaxes(0, 1), k.swapaxes(0, 1), v.swapaxes(0, 1), mask, **options)
                for q, k, v, mask in zip(self.q, self._k, self._v, self.mask, strict=True)
            ]
        )


def check(inputs: Inputs, hook: LlamaHook, **options: Any) -> None:
    llama_graph, hooked_graph = inputs.graph(**options), inputs.graph(**options)
    llama, hooked = llama_graph.computed(), hooked_graph.computed(hook)
    counts = hook.counts()
    assert (counts.nodes_native, counts.nodes_fallback) == (1, 0)
    expected = inputs.expected(**options)
    np.testing.assert_allclose(hooked, expected, rtol=2e-5, atol=1e-5)
    distance = np.abs(llama - expected).max()
    assert np.abs(hooked - expected).max() <= max(distance, 1e-6)  # llama.cpp rounds q or v to f16
    llama_graph.close()
    hooked_graph.close()


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("size", [64, 96, 128, 256])
def test_types_and_head_sizes(kv_type: str, size: int, hook: LlamaHook) -> None:
    check(Inputs(size=size, kv_type=kv_type), hook)


def test_head_size_80(hook: LlamaHook) -> None:
    check(Inputs(size=80), hook)


@pytest.mark.parametrize("rows", [1, 8, 40])
def test_sinks(rows: int, hook: LlamaHook) -> None:
    check(Inputs(rows=rows), hook, sinks=np.linspace(-1, 3, 6, dtype=np.float32))


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("streams", [2, 3])
def test_several_streams(streams: int, rows: int, hook: LlamaHook) -> None:
    check(Inputs(streams=streams, rows=rows), hook)


def test_a_soft_cap(hook: LlamaHook) -> None:
    check(Inputs(), hook, softcap=20.0)


@pytest.mark.parametrize(
    "options", [{"max_bias": 8.0}, {"k_name": "k"}, {"k_name": "cache_k_l9999"}], ids=str
)
def test_an_unknown_node_is_left_to_llama_cpp(options: dict[str, Any], hook: LlamaHook) -> None:
    inputs = Inputs()
    llama, hooked = inputs.graph(**options), inputs.graph(**options)
    assert hooked.computed(hook).tobytes() == llama.computed().tobytes()
    counts = hook.counts()
    assert (counts.nodes_native, counts.nodes_fallback) == (0, 1)
    llama.close()
    hooked.close()
