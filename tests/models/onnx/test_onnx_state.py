"""The KV cache of an ONNX model in a file: loading is exact, and other bytes are refused."""

from __future__ import annotations

import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx_decoders import FORMS, Shape, write_decoder
from processes import run_python

from lowtide.models.errors import SnapshotError
from lowtide.models.onnx.config import OnnxOptions
from lowtide.models.onnx.model import OnnxModel
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.read_spec import read_spec

IDS = [int(i) for i in np.random.default_rng(5).integers(0, 320, 90)]
HEADER_BYTES = 16


def open_model(folder: Path, context: int = 512) -> OnnxModel:
    spec = read_spec(folder)
    assert isinstance(spec, OnnxSpec)
    return OnnxModel(spec, OnnxOptions(context=context, batch_size=64, threads=1))


@pytest.fixture
def model(tmp_path: Path) -> Iterator[OnnxModel]:
    with open_model(write_decoder(tmp_path / "tiny")) as made:
        yield made


@pytest.mark.parametrize("form", FORMS)
def test_loading_equals_never_having_stopped(tmp_path: Path, form: str) -> None:
    folder = write_decoder(tmp_path / "tiny", form)
    path = tmp_path / "state"
    with open_model(folder) as original, open_model(folder) as restored:
        original.forward(IDS[:50])
        num_bytes = original.save_kv(path, IDS[:50])
        assert num_bytes == path.stat().st_size
        with path.open("ab") as more:
            more.write(b"other data behind it")
        restored.forward(IDS[20:80])
        assert restored.load_kv(path, num_bytes, 50) == IDS[:50]
        assert restored.num_tokens == 50
        for token_ids in (IDS[50:51], IDS[51:90]):
            expected = original.forward(token_ids).tobytes()
            assert restored.forward(token_ids).tobytes() == expected
        assert restored.truncate(7) == original.truncate(7)
        assert restored.forward([9]).tobytes() == original.forward([9]).tobytes()


def test_only_slots_that_hold_tokens_are_written(model: OnnxModel, tmp_path: Path) -> None:
    sizes = []
    for num_tokens in (10, 30):
        model.truncate(0)
        model.forward(IDS[:num_tokens])
        sizes.append(model.save_kv(tmp_path / "state", IDS[:num_tokens]))
    slot_bytes = 2 * 2 * 64 * 4  # layers, keys and values, width, f32
    assert sizes == [HEADER_BYTES + n * (4 + slot_bytes) for n in (10, 30)]


def test_other_bytes_are_refused(model: OnnxModel, tmp_path: Path) -> None:
    path = tmp_path / "state"
    model.forward([5, 6, 7])
    num_bytes = model.save_kv(path, [5, 6, 7])
    state = path.read_bytes()

    def forged(at: int, number: int) -> bytes:
        return state[:at] + struct.pack("=i", number) + state[at + 4 :]

    cases = (
        (b"", 0, 3, "it is not the KV cache of an ONNX model"),
        (b"x" * 500, 500, 3, "it is not the KV cache of an ONNX model"),
        (forged(8, 2), num_bytes, 3, "or it has another format version"),
        (forged(12, 2), num_bytes, 3, "it holds 2 tokens instead of 3"),
        (state, num_bytes, 4, "it holds 3 tokens instead of 4"),
        (state, num_bytes, -1, "it holds -1 tokens, more than the context of 512"),
        (state, num_bytes, 513, "it holds 513 tokens, more than the context of 512"),
        (state, num_bytes - 1, 3, f"it has {num_bytes - 1:,} bytes instead of {num_bytes:,}"),
        (state + b"x", num_bytes + 1, 3, "bytes instead of"),
        (forged(HEADER_BYTES, 320), num_bytes, 3, "not in the vocabulary"),
        (forged(HEADER_BYTES + 4, -1), num_bytes, 3, "not in the vocabulary"),
        (state[:18], num_bytes, 3, "it ends before"),
        (state[:-5], num_bytes, 3, "it ends before its keys and values do"),
    )
    for data, length, num_tokens, sentence in cases:
        path.write_bytes(data)
        with pytest.raises(SnapshotError, match=sentence):
            model.load_kv(path, length, num_tokens)
        assert model.num_tokens == 0
    with pytest.raises(SnapshotError, match="No such file"):
        model.load_kv(tmp_path / "nowhere", num_bytes, 3)
    path.write_bytes(state)
    assert model.load_kv(path, num_bytes, 3) == [5, 6, 7]


def test_what_a_snapshot_depends_on(model: OnnxModel, tmp_path: Path) -> None:
    """The same folder is the same; other weights of the same shape, or elements, are not."""
    properties = model.snapshot_properties()
    assert set(properties) == {"model", "KV type", "attention", "onnxruntime"}
    with open_model(tmp_path / "tiny", context=64) as again:
        assert again.snapshot_properties() == properties
    with open_model(write_decoder(tmp_path / "half" / "tiny", element="float16")) as half:
        other = half.snapshot_properties()
        assert other["model"] != properties["model"] and other["KV type"] == "f16"
    weights = tmp_path / "tiny" / "model.onnx.data"
    weights.write_bytes(b"\x3c" + weights.read_bytes()[1:])
    with open_model(tmp_path / "tiny") as changed:
        assert changed.snapshot_properties()["model"] != properties["model"]


def test_an_incomplete_write_is_an_error(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", shape=Shape(context=128))
    done = run_python(
        "import resource, signal\n"
        "from pathlib import Path\n"
        "from lowtide.models.read_spec import read_spec\n"
        "from lowtide.models.onnx.model import OnnxModel\n"
        "from lowtide.models.onnx.config import OnnxOptions\n"
        f"signal.signal({int(signal.SIGXFSZ)}, signal.SIG_IGN)\n"
        "options = OnnxOptions(context=128, batch_size=64, threads=1)\n"
        f"with OnnxModel(read_spec(Path({str(folder)!r})), options) as model:\n"
        "    model.forward([5] * 60)\n"
        f"    path = Path({str(tmp_path / 'state')!r})\n"
        "    whole = model.save_kv(path, [5] * 60)\n"
        "    for limit in (4096, whole - 1):\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "        try:\n"
        "            model.save_kv(path, [5] * 60)\n"
        "        except Exception as error:\n"
        "            print(type(error).__name__, error)\n"
    )
    assert done.stdout.splitlines() == ["SnapshotError File too large"] * 2, done.stderr
