"""ONNX graphs that run as they are: every attention operator gives the same logits, and truncation is exact."""

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


def open_model(folder: Path, context: int = 512, verify_batch: int = 1) -> OnnxModel:
    spec = read_spec(folder)
    assert isinstance(spec, OnnxSpec)
    return OnnxModel(
        spec, OnnxOptions(context=context, batch_size=64, threads=1, verify_batch=verify_batch)
    )


@pytest.fixture(params=FORMS)
def model(request: pytest.FixtureRequest, tmp_path: Path):  # type: ignore[no-untyped-def]
    with open_model(write_decoder(tmp_path / "tiny", request.param, SHAPE)) as model:
        yield model


@pytest.mark.parametrize("form", FORMS[1:])
def test_attention_operators_give_the_same_logits(tmp_path: Path, form: str) -> None:
    logits = []
    for name, which in (("one", FORMS[0]), ("two", form)):
        with open_model(write_decoder(tmp_path / name, which, SHAPE)) as model:
            model.forward(IDS[:64])
            logits.append(model.forward(IDS[64:]).copy())
    assert np.abs(logits[0]).max() > 1
    np.testing.assert_allclose(logits[0], logits[1], atol=2e-5)


@pytest.mark.parametrize("form", ["gqa", "decomposed"])
def test_fewer_kv_heads(tmp_path: Path, form: str) -> None:
    shape = Shape(kv_heads=2)
    with open_model(write_decoder(tmp_path / "tiny", form, shape)) as model:
        whole = model.forward(IDS[:60]).copy()
        model.truncate(0)
        for token_id in IDS[:60]:
            logits = model.forward([token_id])
        np.testing.assert_allclose(logits, whole, atol=2e-5)


def test_truncating_equals_never_having_appended(model: OnnxModel) -> None:
    model.forward(IDS[:40])
    expected = model.forward(IDS[40:80]).copy()
    assert model.num_tokens == 80
    for length in (40, 17, 0):
        model.forward(IDS[80:])
        assert model.truncate(length) == length == model.num_tokens
        if length < 40:
            model.forward(IDS[length:40])
        assert np.array_equal(model.forward(IDS[40:80]), expected)
    assert model.truncate(500) == 80


def test_a_copied_cache_is_restored(model: OnnxModel) -> None:
    model.forward(IDS[:50])
    snapshot = memoryview(bytearray(model.snapshot_bytes()))
    model.copy_kv(snapshot)
    expected = model.forward(IDS[50:60]).copy()
    model.truncate(0)
    model.forward(IDS[30:60])
    model.put_kv(snapshot, 50)
    assert model.num_tokens == 50
    assert np.array_equal(model.forward(IDS[50:60]), expected)
    with pytest.raises(SnapshotError, match="not the size of 49 tokens"):
        model.put_kv(snapshot, 49)
    assert model.num_tokens == 0
    with pytest.raises(SnapshotError, match="the copy takes"):
        model.copy_kv(snapshot)


def test_invalid_batches_change_nothing(model: OnnxModel) -> None:
    model.forward(IDS[:10])
    expected = model.forward(IDS[10:12]).copy()
    model.truncate(10)
    for token_ids in ([], IDS[:65], [320], [-1]):
        with pytest.raises(ForwardError):
            model.forward(token_ids)
    assert np.array_equal(model.forward(IDS[10:12]), expected)


def test_the_context_is_the_limit(tmp_path: Path) -> None:
    with open_model(write_decoder(tmp_path / "tiny"), context=20) as model:
        model.forward(IDS[:20])
        with pytest.raises(ForwardError, match="has room for 0"):
            model.forward(IDS[:1])


def test_every_token_of_a_pass_has_logits(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa")
    with open_model(folder, verify_batch=5) as model:
        assert model.max_verify_batch == 5
        model.forward(IDS[:30])
        rows = model.forward_rows(IDS[30:35]).copy()
        assert rows.shape == (5, 320) and model.num_tokens == 35
        assert model.truncate(32) == 32
        alone = [model.forward([token_id]).copy() for token_id in IDS[32:35]]
        np.testing.assert_allclose(rows[2:], alone, atol=2e-5)
        with pytest.raises(
            ForwardError, match="logits of 6 tokens were requested; the plan allows 5"
        ):
            model.forward_rows(IDS[:6])
        assert model.num_tokens == 35


def test_a_graph_with_logits_of_the_last_token_alone(tmp_path: Path) -> None:
    folder, all_rows = write_decoder(tmp_path / "one", last_row=True), tmp_path / "all"
    with open_model(folder, verify_batch=5) as one, open_model(write_decoder(all_rows)) as every:
        assert one.max_verify_batch == 1
        np.testing.assert_allclose(one.forward(IDS[:30]), every.forward(IDS[:30]), atol=2e-5)
        assert one.forward_rows(IDS[:1]).shape == (1, 320)
        with pytest.raises(
            ForwardError, match="logits of 2 tokens were requested; the plan allows 1"
        ):
            one.forward_rows(IDS[:2])


def test_half_precision(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", element="float16")
    with open_model(folder) as half, open_model(write_decoder(tmp_path / "full")) as full:
        assert half.spec.kv_types == ("f16",)
        logits = half.forward(IDS[:30])
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, full.forward(IDS[:30]), atol=0.05)


def test_a_graph_that_onnxruntime_refuses(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny")
    graph = folder / "model.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"GroupQueryAttention", b"GroupQueryAttentiox"))
    with pytest.raises(UnsupportedModel, match="onnxruntime .* cannot run"):
        open_model(folder)


def test_closing_twice(tmp_path: Path) -> None:
    model = open_model(write_decoder(tmp_path / "tiny"))
    model.close()
    model.close()
