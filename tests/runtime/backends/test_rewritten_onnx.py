"""ONNX folders with lowtide's attention in the graph, always inside the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from onnx_decoders import Shape, write_decoder
from processes import run_lowtide

from lowtide import Runtime
from lowtide.models.convert.convert import convert
from lowtide.models.errors import BadOption
from lowtide.models.fake_model import CHAT_TEMPLATE
from lowtide.models.spec import ModelSpec

BIG = Shape(
    layers=4, width=384, heads=6, kv_heads=2, feed_forward=1024, vocabulary=4096, context=2048
)
WIDE = Shape(
    layers=2, width=768, heads=12, kv_heads=4, feed_forward=2048, vocabulary=4096, context=2048
)
DEEP = Shape(layers=24, width=64, heads=4, kv_heads=2, context=2048)
MANY_HEADS = Shape(layers=4, width=384, heads=6, kv_heads=6, feed_forward=1024, context=2048)
TEXT = "The tide goes out. " * 60
GREEDY = {"max_tokens": 12, "temperature": 0}


@pytest.mark.parametrize("form", ["gqa", "gqa packed", "gqa rotary outside", "standard"])
def test_the_same_tokens_as_the_graphs_own_attention(tmp_path: Path, form: str) -> None:
    folder = write_decoder(tmp_path / "tiny", form, Shape(kv_heads=2), chat_template=CHAT_TEMPLATE)
    found = []
    for attention, kv_type in (("llama", None), ("dense", "f32")):
        with Runtime.open(
            folder, memory="2GiB", threads=1, attention=attention, kv_type=kv_type
        ) as runtime:
            result = runtime.generate(TEXT[:200], **GREEDY)
            found.append(result.token_ids)
            again = runtime.generate(TEXT[:150], **GREEDY)
            assert again.stats.reused_tokens > 100
            runtime.trim("complete")
            assert runtime.generate(TEXT[:200], **GREEDY).token_ids == result.token_ids
    assert found[0] == found[1] and len(found[0]) == 12
    assert result.stats.attention == "dense" and result.stats.layers_native == 2


def test_tidal_with_k_beyond_the_context_answers_as_dense(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", Shape(layers=4, kv_heads=2))
    found = []
    for attention in ("dense", "tidal:k=512,layers=1", "tidal:k=80,layers=1"):
        with Runtime.open(folder, memory="2GiB", threads=1, attention=attention) as runtime:
            result = runtime.generate(TEXT[:400], **GREEDY)
            found.append(result.token_ids)
    assert found[0] == found[1] and len(found[2]) == 12
    assert result.stats.attention.startswith("tidal, k 80")


def test_an_fp16_cache_is_half_as_large(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", Shape(kv_heads=2))
    sizes = []
    for kv_type in ("f32", None):
        options = {"memory": "2GiB", "threads": 1, "attention": "dense", "kv_type": kv_type}
        with Runtime.open(folder, **options) as runtime:  # type: ignore[arg-type]
            assert len(runtime.generate(TEXT[:100], **GREEDY).token_ids) == 12
            sizes += [row.num_bytes for row in runtime.plan.rows if "KV" in row.component]
    assert sizes[0] == 2 * sizes[1] > 0


def test_a_policy_is_measured_against_dense_attention(tmp_path: Path) -> None:
    folder = write_decoder(
        tmp_path / "tiny",
        "gqa",
        Shape(layers=4, kv_heads=2, context=1024),
        chat_template=CHAT_TEMPLATE,
    )
    text = tmp_path / "text.txt"
    text.write_text("The tide goes out, and nobody knows why. " * 40)
    reports = {}
    blocks_policy = "delta:granularity=block,sparsity=0.5"
    for policy in ("dense", "tidal:k=200,layers=1", "delta:sparsity=0.5,refine=0", blocks_policy):
        done = run_lowtide(
            *("evaluate", str(folder), "-c", "640", "-t", "1", "--attention", policy, "--json"),
            *("--kv-type", "f32", "--text", str(text)),
        )
        assert done.code == 0, done.stderr
        reports[policy] = json.loads(done.stdout)
    exact, *sparse, blocks = reports.values()
    assert exact["kl"] == 0 and exact["keys_read"] == blocks["keys_read"] == 1
    for found in sparse:
        assert found["kl"] > 0 and 0.3 < found["keys_read"] < 0.7 and found["scores"] is None
    assert blocks["kl"] > 0 and 0.4 < blocks["scores"]["sparsity"] < 0.6
    refused = run_lowtide("evaluate", str(folder), "-c", "640", "--attention", "llama")
    assert refused.code == 2 and "attention is onnxruntime's own" in refused.stderr


CASES: list[tuple[str, Shape, dict[str, Any]]] = [
    ("gqa", BIG, {}),
    ("mha", MANY_HEADS, {}),
    ("standard", BIG, {}),
    ("gqa packed", WIDE, {"bits": 4}),
    ("gqa", WIDE, {"element": "float16"}),
    ("gqa", DEEP, {"external": False}),
]


@pytest.mark.parametrize(("form", "shape", "weights"), CASES, ids=str)
def test_the_peak_is_inside_the_plan(
    tmp_path: Path, form: str, shape: Shape, weights: dict[str, Any]
) -> None:
    folder = write_decoder(tmp_path / "big", form, shape, **weights)
    prompt = TEXT.encode()
    done = run_lowtide(
        *("run", str(folder), "--raw", "--json", "-n", "8", "--temp", "0", "-t", "1"),
        *("--attention", "dense"),
        stdin=prompt,
    )
    assert done.code == 0, done.stderr
    stats = json.loads(done.stdout)["stats"]
    assert stats["prompt_tokens"] == len(prompt)
    assert done.peak_bytes <= stats["planned_bytes"]


@pytest.mark.real
@pytest.mark.parametrize(
    "chosen",
    [
        ("--attention", "llama"),
        ("--attention", "dense"),
        ("--attention", "delta:sparsity=0.5"),
        ("--repack",),
    ],
    ids=" ".join,
)
def test_a_real_model_is_planned_closely(
    tmp_path: Path, smollm2_spec: ModelSpec, chosen: tuple[str, ...]
) -> None:
    folder = convert(smollm2_spec, tmp_path / "smollm2").folder
    done = run_lowtide(
        *("run", str(folder), "--raw", "--json", "-n", "8", "-c", "2048", "-t", "2"),
        *chosen,
        stdin=("The tide comes in. " * 400).encode(),
        timeout=300,
    )
    assert done.code == 0, done.stderr
    stats = json.loads(done.stdout)["stats"]
    assert 1900 < stats["prompt_tokens"] + 8 <= 2048
    assert 0.93 * stats["planned_bytes"] < done.peak_bytes <= stats["planned_bytes"]
    words = (*chosen, "-t", "2", "--memory")
    plan = run_lowtide("plan", str(folder), *words, "60MiB", "--json")
    bound = json.loads(plan.stdout)["lower_bound_bytes"]
    smallest = run_lowtide(
        *("run", str(folder), "--raw", "-n", "4", *words, str(bound)), stdin=TEXT[:400].encode()
    )
    assert smallest.code == 0, smallest.stderr
    assert smallest.peak_bytes <= bound


def test_the_lower_bound_runs(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "big", "gqa", BIG)
    words = ("--attention", "dense", "-t", "1", "--memory")
    plan = run_lowtide("plan", str(folder), *words, "60MiB", "--json")
    bound = json.loads(plan.stdout)["lower_bound_bytes"]
    done = run_lowtide(
        *("run", str(folder), "--raw", "-n", "4", *words, str(bound)), stdin=TEXT[:400].encode()
    )
    assert done.code == 0, done.stderr
    assert done.peak_bytes <= bound


def test_a_graph_that_cannot_be_rewritten_says_why(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", "decomposed")
    with pytest.raises(
        BadOption, match="its own .* because its graph has decomposed attention: leave"
    ):
        Runtime.open(folder, memory="2GiB", attention="dense")
    folder = write_decoder(tmp_path / "inside", "gqa", BIG, external=False)
    with pytest.raises(BadOption, match="has its weights inside the .onnx file"):
        Runtime.open(folder, memory="2GiB", attention="dense")
