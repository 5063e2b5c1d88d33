"""`lowtide bench` on an ONNX folder: compared with the unchanged graph, and answers with drafts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from onnx_decoders import Shape, write_decoder

from lowtide.cli.main import main

OPTIONS = ("--memory", "4GiB", "-t", "1", "--rounds", "1", "-n", "4")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_decoder(tmp_path / "tiny", "gqa", Shape(layers=4, kv_heads=2), last_row=True)


def invoke(*arguments: str) -> Result:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.stderr
    return done


def test_policies_are_compared_with_the_unchanged_graph(folder: Path) -> None:
    attentions = ("--attention", "dense", "--attention", "tidal:k=80,layers=1")
    line = ("bench", str(folder), *OPTIONS, "-d", "100", *attentions)
    cases = json.loads(invoke(*line, "--json").stdout)["cases"]
    assert [case["attention"] for case in cases] == ["dense", "tidal:k=80,layers=1"]
    for case in cases:
        assert case["peer"].startswith("onnxruntime (onnxruntime ")
        assert case["peer"].endswith("), attention: GroupQueryAttention")
        assert (case["layers_native"], case["layers"]) == (4, 4)
        assert all(case[name] > 0 for name in case if name.endswith(("ratio", "per_s", "bytes")))
    printed = invoke(*line).stdout
    assert any(row.split()[:2] == ["100", "onnxruntime"] for row in printed.splitlines())
    assert "onnxruntime is the baseline" in printed


def test_answers_with_drafts(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"category": "copies", "turns": ["tide tide tide tide"]}\n')
    line = ("bench", str(folder), *OPTIONS, "--speculate", "ngram", "--prompts", str(prompts))
    (case,) = json.loads(invoke(*line, "--json").stdout)["cases"]
    assert (case["kind"], case["speculate"], case["attention"]) == ("copies", "ngram", "dense")
    assert case["decode_ratio"] > 0 and (case["same"] or not case["identical"])
