"""ONNX graphs with lowtide's matmul: results against onnxruntime's and the GGUF file's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_decoders import Shape, write_decoder
from tiny_gguf import write_pair

from lowtide.attention.bindings.onnx_ops import OnnxAttention, OnnxMatmul
from lowtide.models.convert.convert import convert
from lowtide.models.errors import LowtideError
from lowtide.models.onnx.config import OnnxOptions
from lowtide.models.onnx.model import OnnxModel
from lowtide.models.onnx.read_spec import repacked_spec
from lowtide.models.onnx.rewrite.model import RewrittenOnnxModel
from lowtide.models.onnx.rewrite.plan import RepackPlan
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.read_spec import read_spec
from lowtide.runtime.backends.kernels.repack import is_valid_tile_file, write_tile_file

IDS = [int(i) for i in np.random.default_rng(3).integers(0, 320, 90)]
PARTS = (0, 64, 66, 67, 68, 90)
WIDE = Shape(width=256, heads=4, kv_heads=4, feed_forward=128)


def ignored(_: int) -> None:
    pass


def form_of(folder: Path) -> tuple[OnnxSpec, RepackPlan]:
    spec = read_spec(folder)
    assert isinstance(spec, OnnxSpec) and isinstance(spec.repack, RepackPlan), spec
    return spec, spec.repack


@pytest.fixture
def open_model(tmp_path: Path) -> Iterator[Callable[..., OnnxModel]]:
    """Opens a folder's graph, repacked or not, with a cache of floats, and closes it."""
    models = []

    def open_one(
        folder: Path, *, repack: bool, threads: int = 2, kv_type: str = "f32"
    ) -> OnnxModel:
        spec, form = form_of(folder)
        options = OnnxOptions(context=256, batch_size=64, threads=threads, kv_type=kv_type)
        if repack:
            tiles = tmp_path / f"{folder.name}.panels"
            write_tile_file(form, folder, tiles, ignored)
            products = OnnxMatmul(form, tiles, 64, threads)
            spec = repacked_spec(spec, form)
            models.append(RewrittenOnnxModel(spec, options, OnnxAttention(threads), products))
        else:
            models.append(OnnxModel(spec, options))
        return models[-1]

    yield open_one
    for model in models:
        model.close()


def passes(model: OnnxModel) -> np.ndarray:
    pairs = pairwise(PARTS)
    return np.stack([np.array(model.forward(IDS[a:b]), np.float64) for a, b in pairs])


def divergence(expected: np.ndarray, found: np.ndarray) -> float:
    p, q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (expected, found))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.parametrize(
    "written",
    [
        {"bits": 4},
        {"bits": 4, "symmetric": False},
        {"bits": 4, "block_size": 64},
        {"bits": 8},
        {"bits": 4, "last_row": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["gqa", "standard", "gqa packed"])
def test_repacked_matmuls_are_as_exact_as_onnxruntimes(
    tmp_path: Path, open_model: Callable[..., OnnxModel], form: str, written: dict[str, Any]
) -> None:
    """Both round rows to 8 bits in blocks, and are as far from float rows."""
    folder = write_decoder(tmp_path / "int8", form, WIDE, **written)
    floats = write_decoder(tmp_path / "floats", form, WIDE, **written, accuracy_level=1)
    exact = passes(open_model(floats, repack=False))
    plain, repacked = (
        divergence(exact, passes(open_model(folder, repack=p))) for p in (False, True)
    )
    assert 0 < repacked < max(2 * plain, 2e-3)


def test_a_token_is_the_same_in_any_batch_and_on_any_threads(
    tmp_path: Path, open_model: Callable[..., OnnxModel]
) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", WIDE, bits=4)
    together = open_model(folder, repack=True, threads=2)
    found = together.forward(IDS[:60])
    one = open_model(folder, repack=True, threads=1)
    for token_id in IDS[:60]:
        alone = one.forward([token_id])
    np.testing.assert_array_equal(alone, found)


@pytest.mark.parametrize(
    ("architecture", "kind", "tied"),
    [
        ("llama", "Q4_1", True),
        ("gemma3", "Q8_0", True),
        ("qwen2", "Q4_0", False),
        ("qwen3", "Q5_0", True),
    ],
)
def test_converted_folders_have_the_logits_of_the_repacked_gguf(
    tmp_path: Path, open_model: Callable[..., OnnxModel], architecture: str, kind: str, tied: bool
) -> None:
    """The weights are the same; only rounding to 8 bits of sums in another order differs."""
    from lowtide import Runtime

    quantised, _ = write_pair(tmp_path, architecture, kind, tied=tied)
    folder = convert(read_spec(quantised), tmp_path / "onnx").folder
    options = {"memory": "4GiB", "context": 256, "threads": 1, "attention": "dense", "repack": True}
    with Runtime.open(quantised, **options) as runtime:  # type: ignore[arg-type]
        pairs = pairwise(PARTS)
        expected = np.stack(
            [np.array(runtime._model.forward(IDS[a:b]), np.float64) for a, b in pairs]
        )
    assert divergence(expected, passes(open_model(folder, repack=True, kv_type="f16"))) < 2e-3


def test_weights_that_no_matmul_reads_stay_with_onnxruntime(
    tmp_path: Path, open_model: Callable[..., OnnxModel]
) -> None:
    quantised, _ = write_pair(tmp_path, "llama", "Q8_0")
    folder = convert(read_spec(quantised), tmp_path / "onnx").folder
    model = open_model(folder, repack=True)
    model.forward(IDS[:5])
    assert isinstance(model, RewrittenOnnxModel) and isinstance(model._matmul_backend, OnnxMatmul)
    _, form = form_of(folder)
    backend = model._matmul_backend
    counts = backend._library.lowtide_onnx_matmul_counts(backend._products)
    assert counts.nodes == len(form.rewrite.matmuls.nodes) == 51
    assert backend.scratch_bytes > 64 * 64


def test_a_damaged_tile_file_is_refused(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", WIDE, bits=4)
    _, form = form_of(folder)
    path = tmp_path / "new" / "tiny.panels"
    assert not is_valid_tile_file(path, form)
    written_bytes: list[int] = []
    write_tile_file(form, folder, path, written_bytes.append)
    assert is_valid_tile_file(path, form) and path.stat().st_size == form.offsets[-1]
    assert sum(written_bytes) == sum(matrix.num_bytes for matrix in form.rewrite.matmuls.matrices)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert not is_valid_tile_file(path, form)
    path.write_bytes(data[:-64])
    assert not is_valid_tile_file(path, form)
    with pytest.raises(LowtideError, match="delete it, and it is written again"):
        OnnxMatmul(form, path, 64, 1)


def test_closing_twice(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", WIDE, bits=4)
    _, form = form_of(folder)
    write_tile_file(form, folder, tmp_path / "tiles", ignored)
    products = OnnxMatmul(form, tmp_path / "tiles", 64, 1)
    products.close()
    products.close()
