"""Delta in an ONNX graph: against its oracle, truncation, and threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_decoders import Shape, write_decoder
from reference import delta_attention, grouped_attention, reference_blocks

from lowtide.attention.bindings.onnx_ops import OnnxAttention
from lowtide.attention.delta.blocks import HeadThresholds
from lowtide.attention.delta.groups import HeadGroups
from lowtide.attention.delta.policy import Delta
from lowtide.attention.dense import Dense
from lowtide.attention.policy import AttentionPolicy, PassController
from lowtide.memory.plan.estimates import attention_bytes
from lowtide.models.onnx.config import OnnxOptions
from lowtide.models.onnx.rewrite.model import RewrittenOnnxModel
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.read_spec import read_spec

SHAPE = Shape(layers=3, kv_heads=2, context=1024)
IDS = [int(i) for i in np.random.default_rng(5).integers(3, 320, 700)]
TOKENS = Delta(sparsity=0.5, window=70)
BLOCKS = Delta(granularity="block", sparsity=0.5, window=70)
GRANULARITIES = pytest.mark.parametrize(
    "policy", [TOKENS, BLOCKS], ids=lambda policy: policy.granularity
)
BATCHES = (128, 128, 77, 1, 1, 1)


class OpenModel:
    """A small decoder of random weights with lowtide's attention in its graph."""

    def __init__(self, folder: Path, *, kv_type: str = "f16", threads: int = 1) -> None:
        spec = read_spec(folder)
        assert isinstance(spec, OnnxSpec)
        self.attention = OnnxAttention(threads)
        options = OnnxOptions(context=1024, batch_size=128, threads=threads, kv_type=kv_type)
        self.model = RewrittenOnnxModel(spec, options, self.attention)

    def start(self, policy: AttentionPolicy) -> PassController:
        """Attend as a policy does, in prompts and decoding alike."""
        spec = self.model.spec
        controller = policy.resolve(spec).configure(self.attention, spec)
        controller.begin_prefill()
        return controller

    def read(self, batches: Sequence[int], begin: int | None = None) -> np.ndarray:
        """Append so many tokens in each pass; return the logits of the last one."""
        logits = np.empty(0)
        for num_tokens in batches:
            at = self.model.num_tokens if begin is None else begin
            logits = self.model.forward(IDS[at : at + num_tokens]).copy()
            begin = None if begin is None else begin + num_tokens
        return logits

    def read_all(self, policy: AttentionPolicy, batches: Sequence[int] = BATCHES) -> np.ndarray:
        self.model.truncate(0)
        self.start(policy)
        return self.read(batches)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("onnx") / "tiny", "gqa", SHAPE)


@pytest.fixture(scope="module")
def small_model(folder: Path) -> Iterator[OpenModel]:
    made = OpenModel(folder)
    yield made
    made.model.close()


@pytest.mark.parametrize(
    "policy",
    [
        Delta(sparsity=0),
        Delta(sparsity=0.5, window=1024),
        Delta(granularity="block", threshold=0),
        Delta(granularity="block", block=16, sparsity=0.5, window=1024),
        Delta(granularity="element", threshold=0),
    ],
    ids=repr,
)
@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_with_nothing_merged_it_is_dense(folder: Path, policy: Delta, kv_type: str) -> None:
    made = OpenModel(folder, kv_type=kv_type)
    dense, found, far = (made.read_all(one) for one in (Dense(), policy, TOKENS))
    made.model.close()
    # Another order of summation rounds some halves of the cache otherwise; groups are in halves, too.
    allowed = 2e-4 if kv_type == "f16" else 5e-3
    assert np.abs(found - dense).max() < allowed < np.abs(far - dense).max() / 10


class OneLayer:
    """A decoder of one layer cut in two: the inputs of attention, and the logits of its result."""

    def __init__(self, folder: Path, num_tokens: int) -> None:
        spec = read_spec(folder)
        assert isinstance(spec, OnnxSpec) and not isinstance(spec.rewrite, str)
        node = spec.rewrite.layers[0]
        model = onnx.load(folder / "model.onnx")
        names = (node.query, node.key, node.value)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        self._inputs = {
            "input_ids": np.array([IDS[:num_tokens]], np.int64),
            "attention_mask": np.ones((1, num_tokens), np.int64),
            "position_ids": np.arange(num_tokens, dtype=np.int64)[None],
        }
        none = np.zeros((1, spec.num_kv_heads[0], 0, spec.key_head_dim), np.float32)
        self._inputs |= {name: none for ports in spec.ports.layers for name in ports.past}
        made = session.run(list(names), self._inputs)
        query, key, value = (a.reshape(num_tokens, -1, spec.key_head_dim) for a in made)
        self.query = query
        self.key, self.value = (a.astype(np.float16).astype(np.float64) for a in (key, value))

        del model.graph.output[1:]
        del model.graph.node[node.index]
        shape = (1, num_tokens, SHAPE.heads * SHAPE.head_size)
        attended = onnx.helper.make_tensor_value_info(node.output, onnx.TensorProto.FLOAT, shape)
        model.graph.input.append(attended)
        self._rest, self._attended = model.SerializeToString(), node.output

    def logits(self, rows: np.ndarray) -> np.ndarray:
        """Return the logits of the last tokens from their attention, (queries, heads, head_dim)."""
        num_tokens = self._inputs["input_ids"].shape[1]
        whole = np.zeros((1, num_tokens, rows[0].size), np.float32)
        whole[0, -len(rows) :] = rows.reshape(len(rows), -1)
        session = onnxruntime.InferenceSession(self._rest)
        found: np.ndarray = session.run(["logits"], self._inputs | {self._attended: whole})[0][0]
        return found[-len(rows) :]


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape(layers=1, kv_heads=2, context=1024)
    return write_decoder(tmp_path_factory.mktemp("one") / "tiny", "gqa rotary outside", shape)


@pytest.mark.parametrize(
    "policy",
    [
        Delta(sparsity=0.5, window=70),
        Delta(sparsity=0.25, window=1, sinks=0),
        Delta(granularity="block", threshold=1, window=70, refine=0.01),
        Delta(granularity="block", block=16, threshold=0.7, window=1, refine=0),
        Delta(granularity="element", threshold=0.5, window=70),
    ],
    ids=repr,
)
def test_attention_equals_the_oracle(one_layer: Path, policy: Delta) -> None:
    oracle, num_rows, made = OneLayer(one_layer, 300), 4, OpenModel(one_layer)
    policy = policy.resolve(made.model.spec)
    controller = made.start(policy)
    made.read((128, 128, 40))
    controller.begin_decode()
    found = np.array([made.read((1,)) for _ in range(num_rows)])
    by_head = []
    group = SHAPE.heads // SHAPE.kv_heads
    for head in range(SHAPE.kv_heads):
        q = oracle.query[-num_rows:, head * group : (head + 1) * group]
        k, v = oracle.key[:, head], oracle.value[:, head]
        common: dict[str, Any] = {
            "scale": SHAPE.head_size**-0.5,
            "window": policy.window,
            "refine": policy.refine,
        }
        if isinstance(policy.params, HeadGroups):
            count = policy.params.num_groups[0][head]
            scales = np.ones(SHAPE.head_size)
            by_head.append(
                grouped_attention(
                    q, k, v, scales, num_groups=count, num_sink_tokens=policy.sinks, **common
                )
            )
        else:
            assert isinstance(policy.params, HeadThresholds) and policy.threshold is not None
            thresholds = np.full(SHAPE.head_size, policy.threshold)
            block = policy.params.block
            merged, _ = reference_blocks(k, thresholds, num_first=4, block=block)
            by_head.append(
                delta_attention(q, k[:, None], v[:, None], merged[:, None], page=64, **common)
            )
    expected = oracle.logits(np.concatenate(by_head, axis=1))
    dense = OpenModel(one_layer)
    dense.start(Dense())
    dense.read((128, 128, 40))
    exact = np.array([dense.read((1,)) for _ in range(num_rows)])
    made.model.close()
    dense.model.close()
    off = np.abs(found - exact).max()
    assert np.abs(found - expected).max() < min(2e-3, off / 100)


@GRANULARITIES
def test_truncating_equals_never_having_read_on(small_model: OpenModel, policy: Delta) -> None:
    expected = small_model.read_all(policy, (128, 128, 44))
    small_model.read((100, 1, 1))
    assert small_model.model.truncate(200) == 200
    assert np.array_equal(small_model.read((60, 39, 1)), expected)
    small_model.model.truncate(0)
    small_model.read((128, 100), begin=300)
    small_model.model.truncate(0)
    assert np.array_equal(small_model.read((100, 100, 100)), expected)


@GRANULARITIES
def test_restored_tokens_are_merged_again(small_model: OpenModel, policy: Delta) -> None:
    """A snapshot restores slots that no pass has written: what was merged of others is not theirs."""
    small_model.read_all(policy, (128, 128))
    snapshot = memoryview(bytearray(small_model.model.snapshot_bytes()))
    small_model.model.copy_kv(snapshot)
    expected = small_model.read((44,))
    small_model.model.truncate(0)
    small_model.read((128, 128, 100), begin=300)
    small_model.model.put_kv(snapshot, 256)
    assert np.array_equal(small_model.read((44,)), expected)


def test_policies_that_follow_one_another_do_not_mix(small_model: OpenModel) -> None:
    logits = [small_model.read_all(policy).tobytes() for policy in (TOKENS, BLOCKS, Dense()) * 2]
    assert logits[:3] == logits[3:] and len(set(logits)) == 3
    small_model.read_all(Dense(), (128, 72))
    small_model.start(TOKENS)
    expected = small_model.read((60, 1))
    small_model.read_all(TOKENS, (128, 128, 128))
    small_model.model.truncate(0)
    small_model.start(Dense())
    small_model.read((128, 72))
    small_model.start(TOKENS)
    assert np.array_equal(small_model.read((60, 1)), expected)


@GRANULARITIES
def test_threads_change_nothing(folder: Path, policy: Delta) -> None:
    found = []
    for threads in (1, 2):
        made = OpenModel(folder, threads=threads)
        found.append(made.read_all(policy, (128, 128, 128, 100, 1, 1)))
        made.model.close()
    assert np.array_equal(*found)


def test_fewer_keys_are_read(small_model: OpenModel) -> None:
    before = small_model.attention.counts()
    small_model.read_all(TOKENS)
    between = small_model.attention.counts()
    small_model.read_all(BLOCKS)
    after = small_model.attention.counts()
    read, held = between.keys_read - before.keys_read, between.keys_visible - before.keys_visible
    assert 0.6 < read / held < 0.9 and between.scores == before.scores
    scores = after.scores - between.scores
    assert 0.45 <= scores.sparsity <= 0.52 and 0 < scores.skipped < scores.sparsity
    assert scores.key_bytes_read < scores.key_bytes_total


def test_layers_with_a_sliding_window_stay_dense(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", SHAPE, attributes={"window": 100})
    made = OpenModel(folder)
    for policy in (TOKENS, BLOCKS):
        assert np.array_equal(made.read_all(policy), made.read_all(Dense()))
    made.model.close()


@pytest.mark.parametrize(
    "policy", [TOKENS, Delta(granularity="element", threshold=0)], ids=lambda p: p.granularity
)
def test_scratch_stays_inside_the_plan(folder: Path, policy: Delta) -> None:
    made = OpenModel(folder)
    spec = made.model.spec
    made.read_all(Dense(), (128,) * 5)
    before = made.attention.counts().scratch_bytes
    made.read_all(policy, (128,) * 5)
    held = made.attention.counts().scratch_bytes - before
    made.model.close()
    planned = attention_bytes(spec, 1024, 1)
    planned += policy.resolve(spec).memory.scratch_bytes(spec, 1024, 1)
    assert 0 < held <= planned
