"""Delta attention in ONNX models: answers, statistics, prefix cache, speculation, plan and calibrations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx_decoders import Shape, write_decoder
from speculating import CHEAP, Ticks
from tiny_gguf import write_pair

from lowtide import Delta, Runtime
from lowtide.attention.calibration import Calibration, save_calibration
from lowtide.attention.delta.blocks import HeadThresholds
from lowtide.attention.delta.groups import HeadGroups
from lowtide.memory.plan.line import CACHE, SCRATCH
from lowtide.models.convert.convert import convert
from lowtide.models.errors import BadOption
from lowtide.models.read_spec import read_spec
from lowtide.runtime.planning.plan import LoadConfig, plan_reference
from lowtide.runtime.speculation.step_cost import StepCostModel

TEXT = "The tide goes out. " * 40
ROWS, BLOCKS = "delta:sparsity=0.5,window=70", "delta:granularity=block,sparsity=0.5,window=70"
OPTIONS = {"memory": "2GiB", "context": 1024, "threads": 2}
GREEDY = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape(layers=4, kv_heads=2, context=1024)
    folder = tmp_path_factory.mktemp("onnx") / "tiny"
    return write_decoder(folder, "gqa", shape, bits=4, last_row=True)


def test_statistics_of_skipped_work(tiny: Path) -> None:
    stats = []
    for attention in ("dense", ROWS, BLOCKS):
        with Runtime.open(tiny, attention=attention, **OPTIONS) as runtime:  # type: ignore[arg-type]
            stats.append(runtime.generate(TEXT, **GREEDY).stats)
            assert stats[-1].layers_native == 4
    dense, rows, blocks = stats
    assert rows.attention.startswith("delta, sparsity 50%, window 70")
    assert blocks.attention.startswith("delta, blocks of 8, sparsity 50%, window 70")
    assert dense.attended_share == blocks.attended_share == 1 > 0.7 > rows.attended_share  # type: ignore[operator]
    assert dense.scores is None is rows.scores
    assert blocks.scores is not None and 0.3 < blocks.scores["skipped"] < 0.55


@pytest.mark.parametrize("attention", [ROWS, BLOCKS])
def test_a_restored_prompt_is_answered_the_same(tiny: Path, attention: str) -> None:
    with Runtime.open(tiny, attention=attention, prefix_cache="16MiB", **OPTIONS) as runtime:  # type: ignore[arg-type]
        first = runtime.generate(TEXT, **GREEDY)
        runtime.generate(TEXT[::-1], **GREEDY)
        back = runtime.generate(TEXT, **GREEDY)
    assert back.token_ids == first.token_ids and back.stats.restored_tokens > 700


@pytest.mark.parametrize("attention", [ROWS, BLOCKS])
def test_speculation_answers_as_the_plain_loop(tiny: Path, attention: str) -> None:
    found = []
    for speculate in ("off", "auto"):
        with Runtime.open(tiny, attention=attention, speculate=speculate, **OPTIONS) as runtime:  # type: ignore[arg-type]
            speculation = runtime._engine.speculation
            if speculation is not None:
                speculation.costs = StepCostModel(CHEAP, Ticks())
            result = runtime.generate(TEXT, max_tokens=60, temperature=0)
            runtime._session.sync()
            found.append((result.token_ids, runtime._session.decode_token(11).copy()))
    stats = result.stats.speculation
    assert stats is not None and stats["rounds"] > 0
    if stats["identical"]:  # depends on this machine's matmul kernels
        assert found[0][0] == found[1][0] and np.array_equal(found[0][1], found[1][1])
    else:
        assert stats["nondeterminism"].startswith("matmuls of int4 on this machine round")


def test_the_plan_has_what_delta_keeps_beside_the_cache(tiny: Path) -> None:
    def rows(attention: str) -> dict[str, tuple[int, str]]:
        planned = plan_reference(tiny, LoadConfig(attention=attention, **OPTIONS))  # type: ignore[arg-type]
        return {row.component: (row.num_bytes, row.why) for row in planned.plan.rows}

    dense, grouped, blocks = map(rows, ("dense", ROWS, BLOCKS))
    assert "groups of keys beside the cache" in grouped[SCRATCH][1]
    assert "key blocks beside the cache" in blocks[SCRATCH][1]
    assert min(grouped[SCRATCH][0], blocks[SCRATCH][0]) > dense[SCRATCH][0]
    assert dense[CACHE] == grouped[CACHE] == blocks[CACHE]


def test_calibrations_of_the_source_apply_to_the_converted_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    quantised, _ = write_pair(tmp_path, "llama", "Q4_0")
    written = read_spec(quantised)
    shape = (written.num_layers, written.num_kv_heads[0], written.key_head_dim)
    squares = np.ones(shape, np.float32)
    units = HeadGroups.uniform(*shape, 24)
    thresholds = np.full(shape[:2], 0.75, np.float32)
    states = HeadThresholds.of_squares(squares, block=8, thresholds=thresholds)
    metrics = {"kl": 0.01, "sparsity": 0.4}
    for key, params in (("delta-token", units), ("delta-block8", states)):
        calibration = Calibration(
            policy=key,
            fingerprint=written.fingerprint,
            model=written.name,
            context=2048,
            text="a text",
            metrics=metrics,
            params=params.to_params(),  # type: ignore[attr-defined]
        )
        save_calibration(calibration)
    spec = read_spec(convert(written, tmp_path / "onnx").folder)
    assert Delta().resolve(spec).params == units
    found = Delta(granularity="block").resolve(spec).params
    assert isinstance(found, HeadThresholds) and found.thresholds == states.thresholds


@pytest.mark.parametrize("attention", [ROWS, BLOCKS])
def test_a_graph_that_cannot_be_rewritten_says_why(tmp_path: Path, attention: str) -> None:
    folder = write_decoder(tmp_path / "tiny", "decomposed")
    with pytest.raises(BadOption, match="'delta'.* its own .*: leave attention out"):
        Runtime.open(folder, memory="2GiB", attention=attention)
