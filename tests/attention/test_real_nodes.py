"""The dense kernels on the attention of real models, against numpy in double precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from dumped_nodes import DumpedNodes
from kernel_calls import AttentionInputs, attend
from reference import attention, attention_weights
from sample_text import sample_text

from lowtide.attention.bindings.library import usable_kernel_sets
from lowtide.models.catalog import resolve
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.gguf.model import GgufModel
from lowtide.models.gguf.parameters import LoadOptions

pytestmark = pytest.mark.real

TEXT = sample_text()
NUM_TOKENS = 900
ROWS = 48
WINDOW = 256


@pytest.fixture(scope="module", params=["smollm2", "gemma3-270m"])
def nodes(request: Any) -> list[AttentionInputs]:
    """Every layer's attention of the last tokens of a prompt, and of the token after it."""
    dumped = DumpedNodes()
    options = LoadOptions(context=1024, batch_size=ROWS, threads=2, eval_callback=dumped.callback)
    with GgufModel(read_spec(resolve(request.param)), options) as model:
        text = model.tokenizer.encode(TEXT, add_special=True, parse_special=False)[:NUM_TOKENS]
        for at in range(0, NUM_TOKENS - ROWS, ROWS):
            model.forward(text[at : at + ROWS])
        dumped.recording = True
        model.forward(text[model.num_tokens : model.num_tokens + ROWS - 12])
        model.forward(text[-1:])
        assert len(dumped.nodes) == 2 * model.spec.num_layers
    return dumped.nodes


@pytest.mark.parametrize("kernels", usable_kernel_sets())
def test_attention(kernels: str, nodes: list[AttentionInputs]) -> None:
    for node in nodes:
        expected = attention(
            node.q, node.k.astype(np.float64), node.v.astype(np.float64), node.mask,
            scale=node.scale, softcap=node.softcap,
        )  # fmt: skip
        found = attend(node, kernels=kernels, threads=2)
        assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kernels", usable_kernel_sets())
def test_the_weights(kernels: str, nodes: list[AttentionInputs]) -> None:
    """With one-hot values the kernel's result is its weights, a window of keys at a time."""
    for node in nodes[:: max(len(nodes) // 12, 1)]:
        expected = attention_weights(
            node.q, node.k.astype(np.float64), node.mask, scale=node.scale, softcap=node.softcap
        )
        found = weights_of(node, kernels).astype(np.float64)
        visible = expected > 0
        divergence = np.zeros_like(expected)
        divergence[visible] = expected[visible] * np.log(
            expected[visible] / np.maximum(found[visible], 1e-45)
        )
        assert np.abs(divergence.sum(axis=2)).max() <= 1e-6
        assert not found[~visible].any()


def weights_of(node: AttentionInputs, kernels: str) -> Any:
    windows = []
    num_cells, num_kv_heads = node.k.shape[:2]
    for begin in range(0, num_cells, WINDOW):
        one_hot = np.zeros((num_cells, num_kv_heads, WINDOW), np.float16)
        for key in range(begin, min(begin + WINDOW, num_cells)):
            one_hot[key, :, key - begin] = 1
        windows.append(attend(replace(node, v=one_hot, value_dim=WINDOW), kernels=kernels))
    return np.concatenate(windows, axis=2)[:, :, :num_cells]
