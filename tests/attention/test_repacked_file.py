"""Repacked GGUF files: their contents, that GGUF readers accept them, and failures while writing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import write_model
from kernel_calls import RepackedArray, repack_array, unpack_row

from lowtide.models.gguf.header.reader import GgufContents, read_gguf
from lowtide.models.gguf.header.repacked import is_valid, repacked_names
from lowtide.models.gguf.header.spec import read_spec
from lowtide.runtime.backends.kernels.repack import repackable_tensors, write_repacked_gguf


@pytest.fixture
def source(tmp_path: Path) -> GgufContents:
    return read_gguf(write_model(tmp_path / "m.gguf", width=64, feed_forward=96, quantised="Q4_0"))


def written(source: GgufContents, tmp_path: Path, component: str = "component") -> GgufContents:
    target = tmp_path / "repacked" / "m.gguf"
    write_repacked_gguf(source, target, component, lambda _: None)
    return read_gguf(target)


def test_the_tensors_are_those_of_the_source(source: GgufContents, tmp_path: Path) -> None:
    repacked = written(source, tmp_path)
    names = repacked_names(repacked)
    assert set(names) == {t.name for t in repackable_tensors(source)}
    assert "output.weight" in names and "token_embd.weight" not in names
    assert len(names) == 2 * 7 + 1
    before = {t.name: t.data for t in gguf.GGUFReader(source.path).tensors}
    after = {t.name: t for t in gguf.GGUFReader(repacked.path).tensors}
    assert list(before) == list(after)
    for name, tensor in after.items():
        if name in names:
            array = repack_array("Q4_0", before[name], int(tensor.shape[0]))
            assert np.array_equal(array.tiles, tensor.data.reshape(-1))
            assert isinstance(array, RepackedArray) and unpack_row(array, 3).size == tensor.shape[0]
        else:
            assert np.array_equal(before[name], tensor.data)


def test_the_header_equals_the_source(source: GgufContents, tmp_path: Path) -> None:
    repacked = written(source, tmp_path)
    own = {key for key in repacked.metadata if key.startswith("lowtide.")} | {"general.alignment"}
    assert {k: v for k, v in repacked.metadata.items() if k not in own} == source.metadata
    before, after = read_spec(source.path), read_spec(repacked.path)
    assert after.repacked_tensors == repacked_names(repacked) and not before.repacked_tensors
    assert (after.fingerprint, after.weight_bytes) == (before.fingerprint, before.weight_bytes)


def test_an_embedding_that_is_also_the_output_is_repacked(smollm2: Path) -> None:
    names = {tensor.name for tensor in repackable_tensors(read_gguf(smollm2))}
    assert "token_embd.weight" in names and len(names) == 30 * 7 + 1


def test_progress_counts_every_byte(source: GgufContents, tmp_path: Path) -> None:
    written_bytes: list[int] = []
    write_repacked_gguf(source, tmp_path / "p.gguf", "component", written_bytes.append)
    assert sum(written_bytes) == sum(tensor.num_bytes for tensor in source.tensors)


def test_a_valid_file_is_recognised(source: GgufContents, tmp_path: Path) -> None:
    repacked = written(source, tmp_path)
    assert is_valid(repacked, "component")
    assert not is_valid(repacked, "another") and not is_valid(source, "component")
    data = bytearray(repacked.path.read_bytes())
    for at in (repacked.data_start + 5, repacked.data_start + 4000, len(data) - 1):
        changed = bytearray(data)
        changed[at] ^= 1
        repacked.path.write_bytes(changed)
        assert not is_valid(read_gguf(repacked.path), "component")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_behind(
    failing: str, source: GgufContents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"lowtide.models.files.atomic_file.os.{failing}", full)
    with pytest.raises(OSError, match="No space"):
        write_repacked_gguf(source, tmp_path / "repacked" / "m.gguf", "component", lambda _: None)
    assert list((tmp_path / "repacked").iterdir()) == []


def test_a_source_that_is_truncated_meanwhile(source: GgufContents, tmp_path: Path) -> None:
    os.truncate(source.path, source.file_bytes - 100)
    with pytest.raises(OSError, match="ended while it was read"):
        write_repacked_gguf(source, tmp_path / "repacked" / "m.gguf", "component", lambda _: None)
    assert list((tmp_path / "repacked").iterdir()) == []
