"""`lowtide bench` on an ONNX folder: against the graph's own attention, and answers with drafts."""

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


def test_policies_are_measured_against_the_graphs_own_attention(folder: Path) -> None:
    attentions = ("--attention", "dense", "--attention", "tidal:k=80,layers=1")
    line = ("bench", str(folder), *OPTIONS, "-d", "100", *attentions)
    told = json.loads(invoke(*line, "--json").stdout)
    assert [case["attention"] for case in told["cases"]] == ["dense", "tidal:k=80,layers=1"]
    for case in told["cases"]:
        assert case["peer"].startswith("onnxruntime ")
        assert case["peer"].endswith(", the graph with its own GroupQueryAttention")
        assert (case["layers_native"], case["layers"]) == (4, 4)
        assert all(case[name] > 0 for name in case if name.endswith(("ratio", "per_s", "bytes")))
    shown = invoke(*line).stdout
    assert any(row.split()[:2] == ["graph", "100"] for row in shown.splitlines())
    assert "graph is onnxruntime" in shown


def test_answers_are_measured_with_drafts(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"category": "copies", "turns": ["tide tide tide tide"]}\n')
    line = ("bench", str(folder), *OPTIONS, "--speculate", "ngram", "--prompts", str(prompts))
    (case,) = json.loads(invoke(*line, "--json").stdout)["cases"]
    assert (case["kind"], case["speculate"], case["attention"]) == ("copies", "ngram", "dense")
    assert case["decode_ratio"] > 0 and (case["same"] or not case["identical"])
