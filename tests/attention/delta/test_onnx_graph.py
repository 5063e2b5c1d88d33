"""Delta in an ONNX graph: against its oracle, going back, threads, and a store in the cache's place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_decoders import Shape, write_decoder
from reference import delta_attention, grouped_attention, reference_states

from lowtide.attention.bindings.onnx_ops import OnnxAttention
from lowtide.attention.parse import parse_policy
from lowtide.attention.policy import PassController
from lowtide.memory.plan.attention import state_bytes
from lowtide.memory.plan.estimates import attention_bytes, group_bytes
from lowtide.models.errors import LowtideError
from lowtide.models.onnx.config import OnnxOptions
from lowtide.models.onnx.rewrite.model import RewrittenOnnxModel
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.read_spec import read_spec

SHAPE = Shape(layers=3, kv_heads=2, context=1024)
IDS = [int(i) for i in np.random.default_rng(5).integers(3, 320, 700)]
ROWS, BLOCKS = "delta:sparsity=0.5,window=70", "delta:granularity=block,sparsity=0.5,window=70"
KINDS = pytest.mark.parametrize("kind", [ROWS, BLOCKS])
PARTS = (128, 128, 77, 1, 1, 1)


class Opened:
    """A small decoder of random weights with our attention in its graph."""

    def __init__(self, folder: Path, *, kv_type: str = "f16", threads: int = 1) -> None:
        spec = read_spec(folder)
        assert isinstance(spec, OnnxSpec)
        self.attention = OnnxAttention(threads)
        options = OnnxOptions(context=1024, batch_size=128, threads=threads, kv_type=kv_type)
        self.model = RewrittenOnnxModel(spec, options, self.attention)

    def start(self, text: str) -> PassController:
        """Have passes attend as a policy does, prompts and decoding alike."""
        policy = parse_policy(text).resolve(self.model.spec)
        controller = policy.install(self.attention, self.model.spec)
        controller.begin_prefill()
        return controller

    def read(self, parts: Sequence[int], begin: int | None = None) -> np.ndarray:
        """Append so many tokens in each pass; return the last row's logits."""
        logits = np.empty(0)
        for rows in parts:
            at = self.model.num_tokens if begin is None else begin
            logits = self.model.forward(IDS[at : at + rows]).copy()
            begin = None if begin is None else begin + rows
        return logits

    def reread_file(self, text: str, parts: Sequence[int] = PARTS) -> np.ndarray:
        self.model.truncate(0)
        self.start(text)
        return self.read(parts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("onnx") / "tiny", "gqa", SHAPE)


@pytest.fixture(scope="module")
def opened(folder: Path) -> Iterator[Opened]:
    made = Opened(folder)
    yield made
    made.model.close()


@pytest.mark.parametrize(
    "text",
    [
        "delta:sparsity=0",
        "delta:sparsity=0.5,window=1024",
        "delta:granularity=block,threshold=0",
        "delta:granularity=block,block=16,sparsity=0.5,window=1024",
        "delta:granularity=element,threshold=0",
    ],
)
@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_with_nothing_left_out_it_is_dense(folder: Path, text: str, kv_type: str) -> None:
    made = Opened(folder, kv_type=kv_type)
    wanted, found, far = (made.reread_file(kind) for kind in ("dense", text, ROWS))
    made.model.close()
    # Sums in another order round some halves of the cache otherwise; what is kept beside it are halves.
    allowed = 2e-4 if kv_type == "f16" else 5e-3
    assert np.abs(found - wanted).max() < allowed < np.abs(far - wanted).max() / 10


class OneLayer:
    """A decoder of one layer in two: what attention is given, and what is made of its result."""

    def __init__(self, folder: Path, num_tokens: int) -> None:
        spec = read_spec(folder)
        assert isinstance(spec, OnnxSpec) and not isinstance(spec.swap, str)
        node = spec.swap.layers[0]
        model = onnx.load(folder / "model.onnx")
        names = (node.query, node.key, node.value)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        self._given = {
            "input_ids": np.array([IDS[:num_tokens]], np.int64),
            "attention_mask": np.ones((1, num_tokens), np.int64),
            "position_ids": np.arange(num_tokens, dtype=np.int64)[None],
        }
        none = np.zeros((1, spec.num_kv_heads[0], 0, spec.key_head_dim), np.float32)
        self._given |= {name: none for ports in spec.ports.layers for name in ports.past}
        made = session.run(list(names), self._given)
        query, key, value = (a.reshape(num_tokens, -1, spec.key_head_dim) for a in made)
        self.query = query
        self.key, self.value = (a.astype(np.float16).astype(np.float64) for a in (key, value))

        del model.graph.output[1:]
        del model.graph.node[node.index]
        shape = (1, num_tokens, node.width)
        attended = onnx.helper.make_tensor_value_info(node.output, onnx.TensorProto.FLOAT, shape)
        model.graph.input.append(attended)
        self._rest, self._attended = model.SerializeToString(), node.output

    def logits(self, rows: np.ndarray) -> np.ndarray:
        """What the last rows become whose attention is given, (rows, heads, head size)."""
        num_tokens = self._given["input_ids"].shape[1]
        whole = np.zeros((1, num_tokens, rows[0].size), np.float32)
        whole[0, -len(rows) :] = rows.reshape(len(rows), -1)
        session = onnxruntime.InferenceSession(self._rest)
        found: np.ndarray = session.run(["logits"], self._given | {self._attended: whole})[0][0]
        return found[-len(rows) :]


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape(layers=1, kv_heads=2, context=1024)
    return write_decoder(tmp_path_factory.mktemp("one") / "tiny", "gqa rotary outside", shape)


@pytest.mark.parametrize(
    "text",
    [
        "delta:sparsity=0.5,window=70",
        "delta:sparsity=0.25,window=1,sinks=0",
        "delta:granularity=block,threshold=1,window=70,refine=0.01",
        "delta:granularity=block,block=16,threshold=0.7,window=1,refine=0",
        "delta:granularity=element,threshold=0.5,window=70",
    ],
)
def test_it_attends_as_the_oracle_does(one_layer: Path, text: str) -> None:
    oracle, num_rows, made = OneLayer(one_layer, 300), 4, Opened(one_layer)
    policy = parse_policy(text).resolve(made.model.spec)
    controller = policy.install(made.attention, made.model.spec)
    controller.begin_prefill()
    made.read((128, 128, 40))
    controller.begin_decode()
    found = np.array([made.read((1,)) for _ in range(num_rows)])
    by_head = []
    group = SHAPE.heads // SHAPE.kv_heads
    for head in range(SHAPE.kv_heads):
        q = oracle.query[-num_rows:, head * group : (head + 1) * group]
        k, v = oracle.key[:, head], oracle.value[:, head]
        common = {
            "scale": SHAPE.head_size**-0.5,
            "window": policy.window,  # type: ignore[attr-defined]
            "refine": policy.refine,  # type: ignore[attr-defined]
        }
        if "granularity" not in text:
            count = policy.units.num_groups[0][head]  # type: ignore[attr-defined]
            sinks = policy.sinks  # type: ignore[attr-defined]
            scales = np.ones(SHAPE.head_size)
            by_head.append(
                grouped_attention(q, k, v, scales, num_groups=count, num_fixed=sinks, **common)
            )
        else:
            thresholds = np.full(SHAPE.head_size, policy.threshold)  # type: ignore[attr-defined]
            block = policy.units.block  # type: ignore[attr-defined]
            states, _ = reference_states(k, thresholds, num_first=4, block=block)
            by_head.append(
                delta_attention(q, k[:, None], v[:, None], states[:, None], page=64, **common)
            )
    wanted = oracle.logits(np.concatenate(by_head, axis=1))
    dense = Opened(one_layer)
    dense.start("dense")
    dense.read((128, 128, 40))
    exact = np.array([dense.read((1,)) for _ in range(num_rows)])
    made.model.close()
    dense.model.close()
    off = np.abs(found - exact).max()
    assert np.abs(found - wanted).max() < min(2e-3, off / 100)


@KINDS
def test_going_back_equals_never_having_been_there(opened: Opened, kind: str) -> None:
    wanted = opened.reread_file(kind, (128, 128, 44))
    opened.read((100, 1, 1))
    assert opened.model.truncate(200) == 200
    assert np.array_equal(opened.read((60, 39, 1)), wanted)
    opened.model.truncate(0)
    opened.read((128, 100), begin=300)
    opened.model.truncate(0)
    assert np.array_equal(opened.read((100, 100, 100)), wanted)


@KINDS
def test_another_sequence_in_the_cells_is_noticed(opened: Opened, kind: str) -> None:
    """States put cells back that no pass has written: what was kept of others is not theirs."""
    opened.reread_file(kind, (128, 128))
    state = memoryview(bytearray(opened.model.state_bytes()))
    opened.model.copy_kv(state)
    wanted = opened.read((44,))
    opened.model.truncate(0)
    opened.read((128, 128, 100), begin=300)
    opened.model.put_kv(state, 256)
    assert np.array_equal(opened.read((44,)), wanted)


def test_policies_that_follow_one_another_do_not_mix(opened: Opened) -> None:
    logits = [opened.reread_file(text).tobytes() for text in (ROWS, BLOCKS, "dense") * 2]
    assert logits[:3] == logits[3:] and len(set(logits)) == 3
    opened.reread_file("dense", (128, 72))
    opened.start(ROWS)
    wanted = opened.read((60, 1))
    opened.reread_file(ROWS, (128, 128, 128))
    opened.model.truncate(0)
    opened.start("dense")
    opened.read((128, 72))
    opened.start(ROWS)
    assert np.array_equal(opened.read((60, 1)), wanted)


@KINDS
def test_threads_change_no_bit(folder: Path, kind: str) -> None:
    found = []
    for threads in (1, 2):
        made = Opened(folder, threads=threads)
        found.append(made.reread_file(kind, (128, 128, 128, 100, 1, 1)))
        made.model.close()
    assert np.array_equal(*found)


def test_less_is_read(opened: Opened) -> None:
    before = opened.attention.counts()
    opened.reread_file(ROWS)
    between = opened.attention.counts()
    opened.reread_file(BLOCKS)
    after = opened.attention.counts()
    read, held = between.keys_read - before.keys_read, between.keys_held - before.keys_held
    assert 0.6 < read / held < 0.9 and between.scores == before.scores
    scores = after.scores - between.scores
    assert 0.45 <= scores.sparsity <= 0.52 and 0 < scores.skipped < scores.sparsity
    assert scores.key_bytes_read < scores.key_bytes_held


def test_layers_that_see_a_window_stay_dense(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", SHAPE, attributes={"window": 100})
    made = Opened(folder)
    for kind in (ROWS, BLOCKS):
        assert np.array_equal(made.reread_file(kind), made.reread_file("dense"))
    made.model.close()


@pytest.mark.parametrize("kind", [ROWS, "delta:granularity=element,threshold=0"])
def test_what_is_kept_stays_inside_its_row(folder: Path, kind: str) -> None:
    made = Opened(folder)
    spec, policy = made.model.spec, parse_policy(kind).resolve(made.model.spec)
    made.reread_file("dense", (128,) * 5)
    before = made.attention.counts().scratch_bytes
    made.reread_file(kind, (128,) * 5)
    held = made.attention.counts().scratch_bytes - before
    made.model.close()
    planned = attention_bytes(spec, 1024, 1)
    if policy.key_groups is not None:
        planned += group_bytes(spec, policy.key_groups, 1024, 1)
    if policy.key_states is not None:
        planned += state_bytes(spec, policy.key_states, 1024, 1)
    assert 0 < held <= planned


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_a_store_in_the_caches_place_answers_the_same(folder: Path, kv_type: str) -> None:
    beside, stored = Opened(folder, kv_type=kv_type), Opened(folder, kv_type=kv_type)
    model, attention = stored.model, stored.attention
    model.min_tokens = lambda: attention.min_tokens
    wanted = beside.reread_file(ROWS, (128,) * 4 + (1, 1))
    found = stored.reread_file(f"{ROWS},store=1", (100,) * 5 + (12, 1, 1))
    assert np.array_equal(found, wanted) and attention.min_tokens > 300
    keys = model._cells.tensor(0, 0)
    assert not keys[: attention.min_tokens - 128].any() and keys[513].any()
    assert model.truncate(510) == 510
    assert np.array_equal(stored.read((2, 1, 1)), wanted)
    assert model.truncate(200) == 0 and attention.min_tokens == 0
    assert np.array_equal(stored.read((128,) * 4 + (1, 1)), wanted)
    stored.start("dense")
    stored.read((1,))
    with pytest.raises(LowtideError, match="store had replaced"):
        stored.start(f"{ROWS},store=1")
    beside.model.close()
    model.close()
