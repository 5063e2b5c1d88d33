"""ONNX folders through the runtime and the command line, always inside the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from onnx_decoders import Shape, write_decoder
from processes import run_lowtide

from lowtide import OverBudget, Runtime
from lowtide.models.errors import BadModelFile, BadOption
from lowtide.models.fake_model import CHAT_TEMPLATE
from lowtide.models.read_spec import read_spec

BIG = Shape(
    layers=4, width=384, heads=6, kv_heads=2, feed_forward=1024, vocabulary=4096, context=2048
)
WIDE = Shape(
    layers=2, width=768, heads=12, kv_heads=4, feed_forward=2048, vocabulary=4096, context=2048
)
TEXT = "The tide goes out. " * 60
GREEDY = {"max_tokens": 12, "temperature": 0}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_decoder(tmp_path / "tiny", chat_template=CHAT_TEMPLATE)


def test_answers_are_the_same_after_truncating(tiny: Path) -> None:
    with Runtime.open(
        tiny, memory="2GiB", threads=1, prefix_cache="4MiB", reference=True
    ) as runtime:
        assert runtime.plan.kv_type == "f32" and runtime.plan.context == 512
        first = runtime.generate("Once upon a time", **GREEDY)
        runtime.generate("Something else", **GREEDY)
        again = runtime.generate("Once upon a time", **GREEDY)
        assert first.token_ids == again.token_ids and len(first.token_ids) == 12
        assert again.stats.restored_tokens > 0
        runtime.trim("complete")
        assert runtime.generate("Once upon a time", **GREEDY).token_ids == first.token_ids


def test_a_chat_reuses_its_kv_cache(tiny: Path) -> None:
    messages = [{"role": "user", "content": "Name a colour."}]
    with Runtime.open(tiny, memory="2GiB", threads=1, reference=True) as runtime:
        *_, last = runtime.chat(messages, **GREEDY)
        *_, again = runtime.chat(messages, **GREEDY)
    assert last.finish_reason == "length" and again.stats.reused_tokens > 20
    assert last.stats.attention == "GroupQueryAttention"


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("form", ["gqa", "mha", "standard", "decomposed"])
def test_the_peak_is_inside_the_plan(tmp_path: Path, form: str, external: bool) -> None:
    shape = BIG if form != "mha" else Shape(**{**vars_of(BIG), "kv_heads": 6})
    folder = write_decoder(tmp_path / "big", form, shape, external=external)
    prompt = TEXT.encode()
    done = run_lowtide(
        *(
            "run",
            str(folder),
            "--raw",
            "--json",
            "-n",
            "8",
            "--temp",
            "0",
            "-t",
            "1",
            "--reference",
        ),
        stdin=prompt,
    )
    assert done.code == 0, done.stderr
    stats = json.loads(done.stdout)["stats"]
    assert stats["prompt_tokens"] == len(prompt)
    assert done.peak_bytes <= stats["planned_bytes"]


@pytest.mark.parametrize("kernels", [(), ("--reference",)], ids=["default", "reference"])
@pytest.mark.parametrize(
    "weights",
    [
        {"bits": 4},
        {"bits": 4, "accuracy_level": 0},
        {"bits": 4, "external": False},
        {"bits": 8},
        {"bits": 4, "element": "float16"},
        {"element": "float16"},
    ],
    ids=str,
)
def test_quantised_weights_stay_inside_the_plan(
    tmp_path: Path, weights: dict[str, Any], kernels: tuple[str, ...]
) -> None:
    folder = write_decoder(tmp_path / "wide", "gqa", WIDE, **weights)
    spec = read_spec(folder)
    assert spec.quantisation == (f"int{weights['bits']}" if "bits" in weights else "float16")
    done = run_lowtide(
        *("run", str(folder), "--raw", "--json", "-n", "4", "--temp", "0", "-t", "1", *kernels),
        stdin=TEXT.encode(),
    )
    assert done.code == 0, done.stderr
    assert done.peak_bytes <= json.loads(done.stdout)["stats"]["planned_bytes"]


def vars_of(shape: Shape) -> dict[str, int]:
    return {name: getattr(shape, name) for name in Shape.__dataclass_fields__}


def test_a_long_text_is_tokenised_inside_the_plan(tmp_path: Path) -> None:
    shape = Shape(context=65536, width=32, heads=2, kv_heads=1)
    folder = write_decoder(tmp_path / "long", "gqa", shape)
    text = b"ab\n" * 200_000  # refused after tokenising: one token per byte
    done = run_lowtide("run", str(folder), "--raw", "--memory", "700MiB", "-t", "1", stdin=text)
    assert done.code == 2 and "the prompt has 600,000 tokens" in done.stderr
    plan = json.loads(
        run_lowtide("plan", str(folder), "--memory", "700MiB", "-t", "1", "--json").stdout
    )
    assert plan["total_bytes"] > done.peak_bytes > 250 << 20


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "big", "gqa", BIG)
    with pytest.raises(OverBudget, match="raise memory to"):
        Runtime.open(folder, memory="60MiB", threads=1)
    done = run_lowtide("plan", str(folder), "--memory", "60MiB")
    assert done.code == 2 and "onnxruntime" in done.stdout


def test_the_lower_bound_runs(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "big", "gqa", BIG)
    plan = run_lowtide("plan", str(folder), "--memory", "60MiB", "--json", "-t", "1")
    bound = json.loads(plan.stdout)["lower_bound_bytes"]
    done = run_lowtide(
        *("run", str(folder), "--raw", "-n", "4", "-t", "1", "--memory", str(bound)),
        stdin=TEXT[:400].encode(),
    )
    assert done.code == 0, done.stderr
    assert done.peak_bytes <= bound


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculate": "draft.gguf"}, "choose ngram, trigram or auto"),
        ({"kv_type": "q8_0"}, "tiny has a KV cache of f32"),
        ({"context": 1000}, "was trained for 512"),
    ],
)
def test_unsupported_options_of_a_graph(
    tiny: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(BadOption, match=message):
        Runtime.open(tiny, memory="2GiB", reference=True, **options)  # type: ignore[arg-type]


def test_another_models_tokenizer_is_refused_before_loading(tiny: Path) -> None:
    from onnx_folders import write_tokenizer

    write_tokenizer(tiny, 400, None)
    with pytest.raises(BadModelFile, match="use the tokenizer that was exported with it"):
        Runtime.open(tiny, memory="2GiB")


def test_commands(tiny: Path) -> None:
    run = run_lowtide("run", str(tiny), "-p", "Hi", "-n", "4", "--temp", "0", "-t", "1")
    assert run.code == 0 and run.stdout and "peak" in run.stderr
    chat = run_lowtide("chat", str(tiny), "-n", "4", "-t", "1", stdin=b"Hi\nAgain\n")
    assert chat.code == 0, chat.stderr
    profile = run_lowtide("profile", str(tiny), "-p", "Hi", "-n", "4", "-t", "1")
    assert profile.code == 0, profile.stderr
    calibrated = run_lowtide("calibrate", str(tiny))
    assert calibrated.code == 2 and "calibrate runs GGUF models only" in calibrated.stderr
    (tiny / "model.onnx.data").unlink()
    broken = run_lowtide("run", str(tiny), "-p", "Hi")
    assert broken.code == 2 and "is missing beside" in broken.stderr
