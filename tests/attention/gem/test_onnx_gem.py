"""GemFilter's prefill in an ONNX graph: scores against numpy, passes that end early, a second cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_decoders import Shape, write_decoder
from reference import attention_weights

from lowtide.attention.bindings.onnx_ops import OnnxAttention
from lowtide.attention.gem.policy import Gem, GemMemory
from lowtide.memory.plan.estimates import padded_context
from lowtide.models.errors import ForwardError
from lowtide.models.onnx.config import OnnxOptions
from lowtide.models.onnx.rewrite.model import RewrittenOnnxModel
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.read_spec import read_spec
from lowtide.runtime.kv.prompt_filter import PromptFilter

PROMPT = [int(i) for i in np.random.default_rng(9).integers(3, 320, 300)]
SHAPE = Shape(layers=5, kv_heads=2)
KINDS: list[dict[str, Any]] = [{}, {"last_row": True}, {"bits": 4}, {"element": "float16"}]


class OpenModel:
    """A small decoder of random weights, and a second cache in the same session."""

    def __init__(self, folder: Path, batch_size: int = 128, kv_type: str = "f32") -> None:
        spec = read_spec(folder)
        assert isinstance(spec, OnnxSpec)
        self.attention = OnnxAttention(2)
        options = OnnxOptions(context=512, batch_size=batch_size, threads=2, kv_type=kv_type)
        self.model = RewrittenOnnxModel(spec, options, self.attention)
        self.reader = RewrittenOnnxModel(spec, options, self.attention, weights_of=self.model)

    def filtered(self, layer: int, **settings: Any) -> PromptFilter:
        policy = Gem(k=100, layer=layer, min_prompt=0, **settings).resolve(self.model.spec)
        made = PromptFilter(self.reader, self.attention, policy.selection)
        made.filter(PROMPT)
        return made

    def scores(self, layer: int, **settings: Any) -> np.ndarray:
        last = self.filtered(layer, **settings).last
        assert last is not None
        return last.scores

    def logits(self) -> np.ndarray:
        self.model.truncate(0)
        for start in range(0, 64, 32):
            self.model.forward(PROMPT[start : start + 32])
        return np.array([self.model.forward((token_id,)).copy() for token_id in (7, 9)])

    def close(self) -> None:
        self.reader.close()
        self.model.close()


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A decoder that applies rotary embeddings before attention, so that both can be seen."""
    return write_decoder(tmp_path / "tiny", "gqa rotary outside", SHAPE)


@pytest.fixture
def small_model(outside: Path) -> Iterator[OpenModel]:
    made = OpenModel(outside)
    yield made
    made.close()


def seen_by_attention(folder: Path, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The queries (rows, heads, size) and keys of the prompt, as onnxruntime itself computes them."""
    import onnxruntime

    spec = read_spec(folder)
    assert isinstance(spec, OnnxSpec) and not isinstance(spec.rewrite, str)
    node = spec.rewrite.layers[layer]
    model = onnx.load(folder / "model.onnx")
    for name in (node.query, node.key):
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    length = len(PROMPT)
    inputs = {
        "input_ids": np.array([PROMPT], np.int64),
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length, dtype=np.int64)[None],
    }
    none = np.zeros((1, SHAPE.kv_heads, 0, SHAPE.head_size), np.float32)
    inputs |= {name: none for ports in spec.ports.layers for name in ports.past}
    query, key = session.run([node.query, node.key], inputs)
    return (
        query.reshape(length, SHAPE.heads, SHAPE.head_size),
        key.reshape(length, SHAPE.kv_heads, SHAPE.head_size),
    )


@pytest.mark.parametrize("layer", [0, 2, 4])
@pytest.mark.parametrize("batch_size", [32, 128])
def test_the_retained_tokens_equal_numpy_over_the_same_queries_and_keys(
    outside: Path, layer: int, batch_size: int
) -> None:
    query, key = seen_by_attention(outside, layer)
    length = len(PROMPT)
    mask = np.where(np.tri(length, dtype=bool), 0, -np.inf).astype(np.float16)[-16:]
    weights = attention_weights(
        query[-16:], key.astype(np.float64), mask, scale=SHAPE.head_size**-0.5
    )
    made = OpenModel(outside, batch_size)
    for heads, scores in (("max", weights.max(axis=(0, 1))), ("sum", weights.sum(axis=(0, 1)))):
        last = made.filtered(layer, heads=heads).last
        assert last is not None
        assert last.scores == pytest.approx(scores, rel=2e-4, abs=1e-6)
        selection = Gem(k=100, layer=layer, heads=heads).selection
        expected = selection.retained(scores.astype(np.float32))
        assert np.array_equal(last.positions, expected)
    made.close()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_early_exit_at_any_layer_leaves_the_model_as_it_was(
    tmp_path: Path, kind: dict[str, Any]
) -> None:
    made = OpenModel(write_decoder(tmp_path / "tiny", "gqa packed", SHAPE, **kind), kv_type="f16")
    before = made.logits()
    for layer in range(SHAPE.layers):
        scores = made.scores(layer)
        assert scores.shape == (len(PROMPT),) and scores.max() > 0
        assert made.reader.num_tokens == 0 and made.model.num_tokens == 66
    # The cache is unchanged, too: the same tokens have the same logits.
    made.model.truncate(64)
    after = np.array([made.model.forward((token_id,)).copy() for token_id in (7, 9)])
    assert np.array_equal(before, after)
    assert np.array_equal(before, made.logits())
    made.close()


def test_a_prompt_in_small_passes_is_scored_the_same(outside: Path, small_model: OpenModel) -> None:
    small = OpenModel(outside, batch_size=32)
    for weights in ("softmax", "raw"):
        found, whole = (made.scores(3, weights=weights) for made in (small, small_model))
        assert found == pytest.approx(whole, rel=1e-3, abs=1e-6)
    small.close()


def test_layers_behind_the_selecting_layer_are_not_computed(small_model: OpenModel) -> None:
    small_model.scores(1)
    small_model.reader.truncate(0)
    small_model.attention.score_prompt(1, Gem(k=100, layer=1).selection.rule, is_last=False)
    small_model.reader.forward(PROMPT[:100])
    small_model.attention.run_whole_passes()
    keys = [small_model.reader._slots.tensor(layer, 0) for layer in range(SHAPE.layers)]
    assert [bool(np.any(tensor[:100])) for tensor in keys] == [True, True, False, False, False]
    assert small_model.reader.num_tokens == 100
    assert small_model.attention.prompt_scores(100) is None


def test_a_pass_that_fails_is_not_one_that_ends(small_model: OpenModel) -> None:
    small_model.attention.score_prompt(1, Gem(k=100, layer=1).selection.rule, is_last=True)
    with pytest.raises(ForwardError, match="is not in the vocabulary"):
        small_model.reader.forward([320])
    small_model.reader.forward(PROMPT[:10])
    small_model.attention.run_whole_passes()
    small_model.reader._binding.bind_cpu_input("input_ids", np.zeros((1, 3), np.int64))
    bind = small_model.reader._bind_array
    small_model.reader._bind_array = lambda name, values: (  # type: ignore[method-assign]
        None if name == "input_ids" else bind(name, values)
    )
    with pytest.raises(ForwardError, match="a forward pass of 1 tokens at 10 failed"):
        small_model.reader.forward([5])
    assert small_model.reader.num_tokens == 10


def test_scratch_stays_inside_the_plan(small_model: OpenModel) -> None:
    small_model.logits()
    before = small_model.attention.counts().scratch_bytes
    small_model.scores(2)
    taken = small_model.attention.counts().scratch_bytes - before
    spec = small_model.model.spec
    masks = 2 * 128 * len(PROMPT)  # of longer passes
    rows = 4 * 128 * spec.num_heads * spec.key_head_dim
    assert 4 * spec.num_heads * len(PROMPT) < taken
    planned = GemMemory().scratch_bytes(spec, 512, 2) - 40 * padded_context(512)
    assert taken <= planned + masks + rows
