"""Speculation in ONNX graphs: tokens and logits of plain decoding, inside the plan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx_decoders import Shape, write_decoder
from processes import run_python
from promising_drafts import largest_speculation
from speculating import CHEAP, Ticks

from lowtide import Runtime
from lowtide.memory.plan.line import SPECULATION
from lowtide.models.convert.convert import convert
from lowtide.models.fake_model import CHAT_TEMPLATE
from lowtide.models.spec import ModelSpec
from lowtide.runtime.speculation.step_cost import StepCostModel


@pytest.fixture(scope="module", autouse=True)
def _speculation_as_large_as_allowed() -> Iterator[None]:
    with largest_speculation():
        yield


OPTIONS = {"memory": "4GiB", "threads": 2, "attention": "dense"}
TEXT = "one two three four one two three four one two three four one two"
SHAPE = Shape(layers=4, kv_heads=2)


def eager(runtime: Runtime) -> Runtime:
    """Verify everything, whatever passes and drafts cost on this machine."""
    speculation = runtime._engine.speculation
    assert speculation is not None
    speculation.costs = StepCostModel(CHEAP, Ticks())
    return runtime


@pytest.mark.parametrize("last_row", [False, True])
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_answers_and_the_cache_equal_those_of_plain_decoding(
    tmp_path: Path, last_row: bool, temperature: float
) -> None:
    folder = write_decoder(
        tmp_path / "tiny", "gqa", SHAPE, bits=4, last_row=last_row, chat_template=CHAT_TEMPLATE
    )
    found = []
    for speculate in ("off", "auto"):
        with Runtime.open(folder, **OPTIONS, speculate=speculate) as runtime:  # type: ignore[arg-type]
            if speculate != "off":
                eager(runtime)
            # From two tokens only: with more, random weights may repeat nothing that could be drafted.
            result = runtime.generate(TEXT, max_tokens=60, temperature=temperature, top_k=2, seed=7)
            runtime._session.sync()
            logits = runtime._session.decode_token(11).copy()
            found.append((result.token_ids, result.text, logits))
    stats = result.stats.speculation
    assert stats is not None and stats["rounds"] > 0 and stats["off_reason"] is None
    if stats["identical"]:  # depends on this machine's matmul kernels
        assert found[0][:2] == found[1][:2]
        assert np.array_equal(found[0][2], found[1][2])
    else:
        assert stats["nondeterminism"].startswith("matmuls of int4 on this machine round")


@pytest.mark.real
def test_a_converted_models_answers_are_those_of_plain_decoding(
    tmp_path: Path, smollm2_spec: ModelSpec
) -> None:
    folder = convert(smollm2_spec, tmp_path / "smollm2").folder
    messages = [{"role": "user", "content": "Write three times: the harbour master counts boats."}]
    found = []
    for speculate in ("off", "auto"):
        with Runtime.open(folder, **OPTIONS, context=512, speculate=speculate) as runtime:  # type: ignore[arg-type]
            if speculate != "off":
                eager(runtime)
            chunks = list(runtime.chat(messages, max_tokens=60, temperature=0))
            found.append([chunk.token_id for chunk in chunks])
    stats = chunks[-1].stats.speculation
    assert stats is not None and stats["accepted"] > 5
    assert found[0] == found[1] or not stats["identical"]


@pytest.mark.parametrize(
    ("options", "last_row", "words"),
    [
        ({"attention": "llama"}, False, "GroupQueryAttention may sum a single token"),
        ({"attention": "tidal:k=80,layers=1"}, False, "tidal selects keys once for all tokens"),
    ],
)
def test_nondeterminism_is_reported(
    tmp_path: Path, options: dict[str, str], last_row: bool, words: str
) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", SHAPE, bits=4, last_row=last_row)
    with Runtime.open(folder, **{**OPTIONS, **options}, speculate="ngram") as runtime:  # type: ignore[arg-type]
        stats = eager(runtime).generate(TEXT, max_tokens=20, temperature=0).stats.speculation
    assert stats is not None and stats["rounds"] > 0 and not stats["identical"]
    assert words in stats["nondeterminism"] or "round a token" in stats["nondeterminism"]


def test_a_graph_with_logits_of_the_last_token_verifies_nothing_and_says_so(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", SHAPE, last_row=True)
    with Runtime.open(folder, **{**OPTIONS, "attention": "llama"}, speculate="ngram") as runtime:  # type: ignore[arg-type]
        stats = runtime.generate(TEXT, max_tokens=8, temperature=0).stats.speculation
    assert stats is not None and stats["rounds"] == 0
    assert stats["off_reason"] == (
        "the graph of tiny computes the logits of a pass's last token only; open with attention='dense'"
    )


@pytest.mark.parametrize("last_row", [False, True])
def test_the_peak_stays_inside_the_plan(tmp_path: Path, last_row: bool) -> None:
    """With a vocabulary so large that logits are most of the memory of a verification."""
    shape = Shape(layers=2, kv_heads=2, vocabulary=32768)
    folder = write_decoder(tmp_path / "wide", "gqa", shape, last_row=last_row)
    measured = run_python(
        f"""
from lowtide import Runtime
from lowtide.memory.plan.speculation.allocator import CostCurve
from lowtide.runtime.speculation.step_cost import StepCostModel
options = {{"memory": "1GiB", "threads": 1, "attention": "dense", "speculate": "auto"}}
with Runtime.open({str(folder)!r}, **options) as runtime:
    cheap = CostCurve(num_rows=(1, 8), seconds=(1.0, 1.1))
    runtime._engine.speculation.costs = StepCostModel(cheap, lambda: 0.0)
    result = runtime.generate({TEXT!r}, max_tokens=60, temperature=0)
    assert result.stats.speculation["rounds"] > 0, result.stats.speculation
    print(runtime.plan.total_bytes)
"""
    )
    assert measured.code == 0, measured.stderr
    assert measured.peak_bytes <= int(measured.stdout.split()[-1])


def test_verification_is_a_line_of_the_plan(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", SHAPE, last_row=True)
    with Runtime.open(folder, **OPTIONS, speculate="auto:draft=3") as runtime:  # type: ignore[arg-type]
        components = {row.component: row.num_bytes for row in runtime.plan.rows}
        assert runtime.plan.verify_batch == 4 and components[SPECULATION] > 3 * 2 * 4 * 320
