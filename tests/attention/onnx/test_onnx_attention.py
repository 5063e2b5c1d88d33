"""ONNX graphs with lowtide's attention: results against onnxruntime's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_decoders import FORMS, Shape, write_decoder

from lowtide.attention.bindings.onnx_ops import OnnxAttention
from lowtide.attention.dense import Dense
from lowtide.attention.tidal.policy import Tidal
from lowtide.models.errors import ForwardError, LowtideError, SnapshotError, UnsupportedModel
from lowtide.models.onnx.config import OnnxOptions
from lowtide.models.onnx.model import OnnxModel
from lowtide.models.onnx.rewrite.model import RewrittenOnnxModel
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.read_spec import read_spec

IDS = [int(i) for i in np.random.default_rng(3).integers(0, 320, 90)]
SWAPPED_FORMS = [form for form in FORMS if form != "decomposed"]
PARTS = (64, 66, 67, 68, 90)


def open_model(
    folder: Path,
    attention: OnnxAttention | None,
    *,
    context: int = 512,
    kv_type: str = "f32",
    verify_batch: int = 1,
) -> OnnxModel:
    spec = read_spec(folder)
    assert isinstance(spec, OnnxSpec)
    options = OnnxOptions(
        context=context, batch_size=64, threads=1, kv_type=kv_type, verify_batch=verify_batch
    )
    if attention is None:
        return OnnxModel(spec, options)
    return RewrittenOnnxModel(spec, options, attention)


@pytest.fixture
def attention() -> Iterator[OnnxAttention]:
    made = OnnxAttention(2)
    yield made
    made.close()


def passes(model: OnnxModel) -> list[np.ndarray]:
    starts = (0, *PARTS[:-1])
    return [model.forward(IDS[start:end]).copy() for start, end in zip(starts, PARTS, strict=True)]


def shape_of(form: str, **changes: object) -> Shape:
    return Shape(**{"kv_heads": 4 if form == "mha" else 2, **changes})  # type: ignore[arg-type]


CASES = [
    *((form, {}) for form in SWAPPED_FORMS),
    ("gqa", {"interleaved": True}),
    ("gqa packed", {"interleaved": True}),
    ("gqa", {"window": 20}),
    ("gqa", {"softcap": 2.0, "scale": 0.4}),
    ("standard", {"softcap": 2.0, "scale": 0.4}),
    ("mha", {"scale": 0.4}),
    ("gqa", {"layers": 5}),
]


@pytest.mark.parametrize(("form", "changes"), CASES, ids=str)
def test_logits_equal_those_of_the_graphs_own_attention(
    tmp_path: Path, attention: OnnxAttention, form: str, changes: dict[str, object]
) -> None:
    shape = shape_of(form, **{k: v for k, v in changes.items() if k == "layers"})
    attributes = {k: v for k, v in changes.items() if k != "layers"}
    folder = write_decoder(tmp_path / "tiny", form, shape, attributes=attributes)
    with open_model(folder, None) as whole, open_model(folder, attention) as swapped:
        for expected, found in zip(passes(whole), passes(swapped), strict=True):
            assert np.abs(expected).max() > 1
            np.testing.assert_allclose(found, expected, atol=1e-5)
    plain = write_decoder(tmp_path / "plain", form, shape)
    if attributes:  # they change what is answered
        with open_model(plain, None) as other:
            assert np.abs(passes(other)[-1] - expected).max() > 1e-3


def test_half_precision(tmp_path: Path, attention: OnnxAttention) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa packed", shape_of("gqa"), element="float16")
    with open_model(folder, None) as whole, open_model(folder, attention, kv_type="f16") as swapped:
        for expected, found in zip(passes(whole), passes(swapped), strict=True):
            np.testing.assert_allclose(found, expected, atol=0.01)


def test_a_cache_of_halves(tmp_path: Path, attention: OnnxAttention) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", shape_of("gqa"))
    with open_model(folder, None) as whole, open_model(folder, attention, kv_type="f16") as swapped:
        np.testing.assert_allclose(passes(swapped)[-1], passes(whole)[-1], atol=0.01)


def test_weights_inside_the_file_and_quantised_weights(tmp_path: Path) -> None:
    for name, changes in (("in", {"external": False}), ("bits", {"bits": 4})):
        folder = write_decoder(tmp_path / name, "gqa", shape_of("gqa"), **changes)  # type: ignore[arg-type]
        with open_model(folder, None) as whole, open_model(folder, OnnxAttention(2)) as swapped:
            np.testing.assert_allclose(passes(swapped)[-1], passes(whole)[-1], atol=1e-4)


@pytest.fixture(params=SWAPPED_FORMS)
def model(
    request: pytest.FixtureRequest, tmp_path: Path, attention: OnnxAttention
) -> Iterator[RewrittenOnnxModel]:
    folder = write_decoder(tmp_path / "tiny", request.param, shape_of(request.param))
    with open_model(folder, attention) as made:
        assert isinstance(made, RewrittenOnnxModel)
        yield made


def test_truncating_equals_never_having_read_on(model: RewrittenOnnxModel) -> None:
    model.forward(IDS[:40])
    expected = model.forward(IDS[40:80]).copy()
    assert model.num_tokens == 80
    for length in (40, 17, 0):
        model.forward(IDS[80:])
        assert model.truncate(length) == length == model.num_tokens
        if length < 40:
            model.forward(IDS[length:40])
        found = model.forward(IDS[40:80])
        if length in (40, 0):  # the same passes
            assert np.array_equal(found, expected)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert model.truncate(500) == 80


def test_a_copied_snapshot_is_restored(model: RewrittenOnnxModel) -> None:
    model.forward(IDS[:50])
    state = memoryview(bytearray(model.snapshot_bytes()))
    model.copy_kv(state)
    expected = model.forward(IDS[50:60]).copy()
    model.truncate(0)
    model.forward(IDS[30:60])
    model.put_kv(state, 50)
    assert np.array_equal(model.forward(IDS[50:60]), expected)
    with pytest.raises(SnapshotError, match="not the size of 49 tokens"):
        model.put_kv(state, 49)


def test_a_saved_snapshot_is_restored(model: RewrittenOnnxModel, tmp_path: Path) -> None:
    path = tmp_path / "state"
    model.forward(IDS[:50])
    num_bytes = model.save_kv(path, IDS[:50])
    expected = model.forward(IDS[50:60]).copy()
    model.truncate(0)
    model.forward(IDS[30:60])
    assert model.load_kv(path, num_bytes, 50) == IDS[:50]
    assert np.array_equal(model.forward(IDS[50:60]), expected)
    assert model.snapshot_properties()["attention"] == "lowtide"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SnapshotError, match="it ends before its keys and values do"):
        model.load_kv(path, num_bytes, 50)
    assert model.num_tokens == 0


def test_a_failed_pass_changes_nothing(model: RewrittenOnnxModel) -> None:
    model.forward(IDS[:10])
    expected = model.forward(IDS[10:12]).copy()
    model.truncate(10)
    for rows in ([], IDS[:65], [320], [-1]):
        with pytest.raises(ForwardError):
            model.forward(rows)
    assert np.array_equal(model.forward(IDS[10:12]), expected)


@pytest.mark.parametrize("weights", [{}, {"bits": 4}, {"element": "float16"}], ids=str)
@pytest.mark.parametrize("last_row", [False, True])
def test_every_token_of_a_pass_has_logits(
    tmp_path: Path, attention: OnnxAttention, weights: dict[str, object], last_row: bool
) -> None:
    """Also if the graph returns the last token's logits only: the rewritten graph returns as many as asked for."""
    shape = shape_of("gqa")
    folder = write_decoder(tmp_path / "tiny", "gqa", shape, last_row=last_row, **weights)  # type: ignore[arg-type]
    with (
        open_model(folder, None) as whole,
        open_model(folder, attention, verify_batch=8) as swapped,
    ):
        assert swapped.max_verify_batch == 8
        atol = 0.01 if weights else 1e-5
        np.testing.assert_allclose(swapped.forward(IDS[:40]), whole.forward(IDS[:40]), atol=atol)
        alone = [swapped.forward([token_id]).copy() for token_id in IDS[40:48]]
        for num_rows in (1, 2, 5, 8):
            assert swapped.truncate(40) == 40
            rows = swapped.forward_rows(IDS[40 : 40 + num_rows])
            assert rows.shape == (num_rows, 320) and rows.dtype == np.float32
            np.testing.assert_allclose(rows, alone[:num_rows], atol=atol)
        with pytest.raises(
            ForwardError, match="logits of 9 tokens were requested; the plan allows 8"
        ):
            swapped.forward_rows(IDS[:9])


def test_a_graph_with_an_unknown_output_is_not_widened(
    tmp_path: Path, attention: OnnxAttention
) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", shape_of("gqa"), last_row=True)
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    cut = next(node for node in graph.graph.node if node.op_type == "Slice")
    gathered = onnx.helper.make_node("Gather", [cut.input[0], "last0"], cut.output, axis=1)
    cut.CopyFrom(gathered)
    onnx.save(graph, folder / "model.onnx")
    with open_model(folder, attention, verify_batch=8) as swapped:
        assert swapped.max_verify_batch == 1
        assert swapped.forward_rows(IDS[:1]).shape == (1, 320)


def test_threads_change_nothing(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", shape_of("gqa"))
    found = []
    for threads in (1, 3):
        attention = OnnxAttention(threads)
        with open_model(folder, attention) as swapped:
            found.append(passes(swapped))
        attention.close()
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one, other)


def test_tidal_in_a_graph(tmp_path: Path, attention: OnnxAttention) -> None:
    shape = shape_of("gqa", layers=4)
    folder = write_decoder(tmp_path / "tiny", "gqa", shape)
    found, shares = [], []
    with open_model(folder, attention) as swapped:
        for k in (None, 500, 40):
            policy = Dense() if k is None else Tidal(k=k, selection_layers=(1,), recent=8)
            controller = policy.configure(attention, swapped.spec)
            swapped.truncate(0)
            controller.begin_prefill()
            swapped.forward(IDS[:64])
            before = attention.counts()
            for token_id in IDS[64:80]:
                controller.begin_decode()
                logits = swapped.forward([token_id]).copy()
            after = attention.counts()
            found.append(logits)
            shares.append(
                (after.keys_read - before.keys_read) / (after.keys_visible - before.keys_visible)
            )
    assert np.array_equal(found[0], found[1]) and shares[:2] == [1, 1]
    # Layers 0 and 1 read everything, 2 and 3 read 40 keys of 65 to 80.
    assert shares[2] == pytest.approx((2 + 2 * 40 / 72.5) / 4, abs=1e-3)
    assert 1e-4 < np.abs(found[2] - found[0]).max() < 2


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("decomposed", "has decomposed attention"),
    ],
)
def test_a_graph_that_cannot_be_rewritten_says_why(
    tmp_path: Path, attention: OnnxAttention, form: str, reason: str
) -> None:
    folder = write_decoder(tmp_path / "tiny", form)
    with pytest.raises(
        UnsupportedModel, match=f"with its own attention, because its graph {reason}"
    ):
        open_model(folder, attention)


def test_positions_without_rotary_embedding_are_not_read(
    tmp_path: Path, attention: OnnxAttention
) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", shape_of("gqa", context=128))
    with pytest.raises(
        UnsupportedModel, match="has rotary tables for 128 positions.*lower context to 128"
    ):
        open_model(folder, attention, context=129)
    with open_model(folder, attention, context=128) as swapped:
        swapped.forward(IDS[:64])
        swapped.forward(IDS[:64])
        with pytest.raises(ForwardError, match="has room for 0"):
            swapped.forward(IDS[:1])


def test_a_graph_with_its_own_attention_runs_beside(
    tmp_path: Path, attention: OnnxAttention
) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", shape_of("gqa"))
    with open_model(folder, attention) as swapped, open_model(folder, None) as whole:
        np.testing.assert_allclose(swapped.forward(IDS[:5]), whole.forward(IDS[:5]), atol=1e-5)


def test_closing_twice(tmp_path: Path, attention: OnnxAttention) -> None:
    made = open_model(write_decoder(tmp_path / "tiny"), attention)
    made.close()
    made.close()
    with pytest.raises(LowtideError, match="was closed with its model"):
        open_model(tmp_path / "tiny", attention)
