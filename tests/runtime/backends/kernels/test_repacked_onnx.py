"""ONNX folders with repacked weights: the same answers, inside the plan; clear errors where that is impossible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from onnx_decoders import Shape, write_decoder
from processes import run_lowtide

from lowtide import Gem, Runtime
from lowtide.models.errors import BadOption
from lowtide.runtime.errors import CannotRepack

BIG = Shape(
    layers=4, width=768, heads=12, kv_heads=4, feed_forward=2048, vocabulary=4096, context=2048
)
SMALL = Shape(layers=4, width=256, heads=4, kv_heads=4, feed_forward=128)
TEXT = "The tide goes out. " * 60
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tiles(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.tiles"))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_peak_is_inside_a_plan_below_onnxruntimes_copies(tmp_path: Path, bits: int) -> None:
    """The first run also writes the repacked weights."""
    folder = write_decoder(tmp_path / "big", "gqa", BIG, bits=bits)
    planned = {}
    for words in (("--attention", "dense", "--no-repack"), ("--repack",), ("--repack",)):
        done = run_lowtide(
            *("run", str(folder), "--raw", "--json", "-n", "8", "--temp", "0", "-t", "1", *words),
            stdin=TEXT.encode(),
        )
        assert done.code == 0, done.stderr
        stats = json.loads(done.stdout)["stats"]
        assert stats["prompt_tokens"] == len(TEXT) and stats["attention"] == "dense"
        assert done.peak_bytes <= stats["planned_bytes"]
        assert stats["repacked_tensors"] == (29 if words == ("--repack",) else 0)
        planned[words] = stats["planned_bytes"]
    assert planned["--repack",] < planned["--attention", "dense", "--no-repack"]
    assert len(tiles(tmp_path)) == 1


def test_the_lower_bound_runs(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "big", "gqa", BIG, bits=4)
    words = ("--repack", "-t", "1", "--memory")
    plan = run_lowtide("plan", str(folder), *words, "60MiB", "--json")
    bound = json.loads(plan.stdout)["lower_bound_bytes"]
    assert not tiles(tmp_path), "a plan writes nothing"
    for _ in ("writing", "reading"):
        done = run_lowtide(
            *("run", str(folder), "--raw", "-n", "4", *words, str(bound)), stdin=TEXT[:400].encode()
        )
        assert done.code == 0, done.stderr
        assert done.peak_bytes <= bound


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "tidal:k=512,layers=1"},
        {"attention": "delta:sparsity=0"},
        {"speculate": "ngram"},
        {"prefix_cache": "1MiB"},
        {"threads": 2},
    ],
    ids=str,
)
def test_other_options_give_the_same_answers(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", SMALL, bits=4)
    found = []
    for more in ({}, options):
        settings = {"memory": "2GiB", "threads": 1, "repack": True, **more}
        with Runtime.open(folder, **settings) as runtime:
            result = runtime.generate(TEXT[:300], **GREEDY)
            assert result.stats.repacked_tensors == 29
            found.append(result.token_ids)
            again = runtime.generate(TEXT[:200], **GREEDY)
            assert again.stats.reused_tokens > 100
    assert found[0] == found[1] and len(found[0]) == 12


def test_gem_filters_with_the_same_weights(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", SMALL, bits=4)
    policy = Gem(k=80, layer=2, continues=True)
    with Runtime.open(folder, memory="2GiB", threads=1, repack=True, attention=policy) as runtime:
        first = runtime.generate(TEXT[:300], **GREEDY)
        assert runtime.generate(TEXT[:300], **GREEDY).token_ids == first.token_ids


def test_models_repack_writes_what_repack_reads(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", SMALL, bits=4)
    done = run_lowtide("models", "repack", str(folder))
    assert done.code == 0 and "Repacked 29 matrices" in done.stderr
    (path,) = tiles(tmp_path)
    assert done.stdout.split()[-1] == str(path)
    written = path.stat().st_mtime_ns
    with Runtime.open(folder, memory="2GiB", threads=1, repack=True) as runtime:
        assert runtime.generate(TEXT[:50], **GREEDY).token_ids
    assert path.stat().st_mtime_ns == written
    path.write_bytes(path.read_bytes()[:-64])
    with Runtime.open(folder, memory="2GiB", threads=1, repack=True) as runtime:
        assert runtime.generate(TEXT[:50], **GREEDY).token_ids
    assert path.stat().st_mtime_ns != written, "a damaged file is made again"


def test_other_weights_have_another_file(tmp_path: Path) -> None:
    for bits in (4, 8):
        folder = write_decoder(tmp_path / str(bits), "gqa", SMALL, bits=bits)
        Runtime.open(folder, memory="2GiB", threads=1, repack=True).close()
    assert len(tiles(tmp_path)) == 2


@pytest.mark.parametrize(
    ("form", "written", "options", "message"),
    [
        ("gqa", {}, {}, "its graph has no matmul .* can be repacked: leave it out"),
        ("decomposed", {"bits": 4}, {}, "its graph has decomposed attention: leave it out"),
        ("gqa", {"bits": 4}, {"provider": "cuda"}, "'cuda'"),
    ],
)
def test_impossible_repacking_is_refused_before_loading(
    tmp_path: Path, form: str, written: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    folder = write_decoder(tmp_path / "tiny", form, SMALL, **written)
    with pytest.raises(BadOption, match=message):
        Runtime.open(folder, memory="2GiB", repack=True, **options)


def test_a_cache_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan does not hold for the original weights, so the model is not loaded."""
    folder = write_decoder(tmp_path / "tiny", "gqa", SMALL, bits=4)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        CannotRepack,
        match="cannot be written .*: set XDG_CACHE_HOME.*choose reference=True",
    ):
        Runtime.open(folder, memory="2GiB", repack=True)
