"""A graph that is run whole: every form answers the same, and going back is exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx_decoders import FORMS, Shape, write_decoder

from lowtide.models.errors import ForwardError, SnapshotError, UnsupportedModel
from lowtide.models.onnx.config import OnnxOptions
from lowtide.models.onnx.model import OnnxModel
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.read_spec import read_spec

IDS = [int(i) for i in np.random.default_rng(3).integers(0, 320, 90)]
SHAPE = Shape(kv_heads=4)


def opened(folder: Path, context: int = 512, verify_batch: int = 1) -> OnnxModel:
    spec = read_spec(folder)
    assert isinstance(spec, OnnxSpec)
    return OnnxModel(
        spec, OnnxOptions(context=context, batch_size=64, threads=1, verify_batch=verify_batch)
    )


@pytest.fixture(params=FORMS)
def model(request: pytest.FixtureRequest, tmp_path: Path):  # type: ignore[no-untyped-def]
    with opened(write_decoder(tmp_path / "tiny", request.param, SHAPE)) as made:
        yield made


@pytest.mark.parametrize("form", FORMS[1:])
def test_forms_answer_the_same(tmp_path: Path, form: str) -> None:
    logits = []
    for name, which in (("one", FORMS[0]), ("two", form)):
        with opened(write_decoder(tmp_path / name, which, SHAPE)) as made:
            made.forward(IDS[:64])
            logits.append(made.forward(IDS[64:]).copy())
    assert np.abs(logits[0]).max() > 1
    np.testing.assert_allclose(logits[0], logits[1], atol=2e-5)


@pytest.mark.parametrize("form", ["gqa", "decomposed"])
def test_fewer_kv_heads(tmp_path: Path, form: str) -> None:
    shape = Shape(kv_heads=2)
    with opened(write_decoder(tmp_path / "tiny", form, shape)) as made:
        whole = made.forward(IDS[:60]).copy()
        made.truncate(0)
        for token_id in IDS[:60]:
            logits = made.forward([token_id])
        np.testing.assert_allclose(logits, whole, atol=2e-5)


def test_going_back_equals_never_having_been_there(model: OnnxModel) -> None:
    model.forward(IDS[:40])
    wanted = model.forward(IDS[40:80]).copy()
    assert model.num_tokens == 80
    for kept in (40, 17, 0):
        model.forward(IDS[80:])
        assert model.truncate(kept) == kept == model.num_tokens
        if kept < 40:
            model.forward(IDS[kept:40])
        assert np.array_equal(model.forward(IDS[40:80]), wanted)
    assert model.truncate(500) == 80


def test_a_copied_state_comes_back(model: OnnxModel) -> None:
    model.forward(IDS[:50])
    state = memoryview(bytearray(model.state_bytes()))
    model.copy_kv(state)
    wanted = model.forward(IDS[50:60]).copy()
    model.truncate(0)
    model.forward(IDS[30:60])
    model.put_kv(state, 50)
    assert model.num_tokens == 50
    assert np.array_equal(model.forward(IDS[50:60]), wanted)
    with pytest.raises(SnapshotError, match="which is not 49 tokens'"):
        model.put_kv(state, 49)
    assert model.num_tokens == 0
    with pytest.raises(SnapshotError, match="are wanted"):
        model.copy_kv(state)


def test_rows_that_do_not_go_in_change_nothing(model: OnnxModel) -> None:
    model.forward(IDS[:10])
    wanted = model.forward(IDS[10:12]).copy()
    model.truncate(10)
    for rows in ([], IDS[:65], [320], [-1]):
        with pytest.raises(ForwardError):
            model.forward(rows)
    assert np.array_equal(model.forward(IDS[10:12]), wanted)


def test_the_context_is_the_limit(tmp_path: Path) -> None:
    with opened(write_decoder(tmp_path / "tiny"), context=20) as made:
        made.forward(IDS[:20])
        with pytest.raises(ForwardError, match="room for 0 tokens"):
            made.forward(IDS[:1])


def test_rows_of_a_pass_have_logits_of_their_own(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa")
    with opened(folder, verify_batch=5) as made:
        assert made.max_verify_batch == 5
        made.forward(IDS[:30])
        rows = made.forward_rows(IDS[30:35]).copy()
        assert rows.shape == (5, 320) and made.num_tokens == 35
        assert made.truncate(32) == 32
        alone = [made.forward([token_id]).copy() for token_id in IDS[32:35]]
        np.testing.assert_allclose(rows[2:], alone, atol=2e-5)
        with pytest.raises(ForwardError, match="logits of 6 rows are wanted, 5 are planned"):
            made.forward_rows(IDS[:6])
        assert made.num_tokens == 35


def test_a_graph_that_leaves_one_row_makes_logits_of_that(tmp_path: Path) -> None:
    folder, all_rows = write_decoder(tmp_path / "one", last_row=True), tmp_path / "all"
    with opened(folder, verify_batch=5) as one, opened(write_decoder(all_rows)) as every:
        assert one.max_verify_batch == 1
        np.testing.assert_allclose(one.forward(IDS[:30]), every.forward(IDS[:30]), atol=2e-5)
        assert one.forward_rows(IDS[:1]).shape == (1, 320)
        with pytest.raises(ForwardError, match="logits of 2 rows are wanted, 1 are planned"):
            one.forward_rows(IDS[:2])


def test_half_precision(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", element="float16")
    with opened(folder) as half, opened(write_decoder(tmp_path / "full")) as full:
        assert half.spec.kv_types == ("f16",)
        logits = half.forward(IDS[:30])
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, full.forward(IDS[:30]), atol=0.05)


def test_a_graph_that_onnxruntime_refuses(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny")
    graph = folder / "model.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"GroupQueryAttention", b"GroupQueryAttentiox"))
    with pytest.raises(UnsupportedModel, match="onnxruntime .* cannot run"):
        opened(folder)


def test_closing_twice(tmp_path: Path) -> None:
    made = opened(write_decoder(tmp_path / "tiny"))
    made.close()
    made.close()
