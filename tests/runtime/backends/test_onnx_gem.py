"""GemFilter in ONNX graphs: retained tokens, answers and memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from onnx_decoders import Shape, write_decoder
from processes import run_lowtide, run_python

from lowtide import Dense, Gem, GenerationResult, Runtime, Tidal
from lowtide.attention.gem.policy import GemMemory
from lowtide.attention.policy import AttentionPolicy
from lowtide.memory.plan.line import FILTER_PREFILL
from lowtide.models.convert.convert import convert
from lowtide.models.errors import BadOption
from lowtide.models.fake_model import CHAT_TEMPLATE
from lowtide.models.read_spec import read_spec
from lowtide.models.spec import ModelSpec
from lowtide.runtime.evaluation.evaluate import SPARE_TOKENS, evaluate
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

SHAPE = Shape(layers=4, kv_heads=2, context=2048)
SENTENCES = [f"Boat {i} left the harbour with {i * 7 % 100} crates of fish. " for i in range(90)]
NEEDLE = "The secret pass key is 48213. Remember it: 48213 is the pass key. "
LONG = "".join([*SENTENCES[:40], NEEDLE, *SENTENCES[40:]])
TEXT = "".join(SENTENCES[:24])
QUESTION = [{"role": "user", "content": TEXT + "How many crates did Boat 3 leave with?"}]
ANOTHER = [{"role": "user", "content": TEXT + "What floats?"}]
POLICY = Gem(k=300, layer=1)
OPTIONS = {"memory": "2GiB", "threads": 2}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_decoder(
        tmp_path / "tiny", "gqa", SHAPE, bits=4, last_row=True, chat_template=CHAT_TEMPLATE
    )


def ask(runtime: Runtime, messages: list[dict[str, str]], num_tokens: int = 8) -> GenerationResult:
    return GenerationResult.of(runtime.chat(messages, max_tokens=num_tokens, temperature=0))


def test_a_long_prompt_is_filtered_and_its_answer_explained(tiny: Path) -> None:
    with Runtime.open(tiny, **OPTIONS, attention=POLICY) as runtime:  # type: ignore[arg-type]
        pieces = list(runtime.chat(QUESTION, max_tokens=4, temperature=0, explain=True))
        stats = pieces[-1].stats
        assert stats.prompt_tokens > 1100 and stats.retained_tokens == 300
        assert stats.attention == "gem, k 300, layer 1 (user), then dense"
        assert list(pieces[-1].retained) == runtime.retained_spans()
        assert sum(passage.tokens for passage in runtime.retained_spans()) == 300
        assert len(runtime._session.token_ids) < 310
        short = ask(runtime, [{"role": "user", "content": "What floats?"}])
        assert short.stats.retained_tokens == short.stats.prompt_tokens
        with pytest.raises(BadOption, match="ask in a chat, or open with"):
            runtime.generate("Once upon a time")


def test_k_beyond_the_prompt_retains_the_whole_prompt(tiny: Path) -> None:
    answers = []
    for attention in ("dense", Gem(k=1900, layer=2)):
        with Runtime.open(tiny, **OPTIONS, attention=attention) as runtime:  # type: ignore[arg-type]
            answers.append(ask(runtime, QUESTION).token_ids)
    assert answers[0] == answers[1] and len(answers[0]) == 8


@pytest.mark.parametrize("then", [Dense(), Tidal(k=80, selection_layers=(1,))], ids=str)
def test_another_question_on_the_same_text_reuses_the_filter_pass(
    tiny: Path, then: AttentionPolicy
) -> None:
    """It selects the same tokens as the first question would: sparse decoding leaves no trace."""
    attention = Gem(k=300, layer=3, then=then)
    with Runtime.open(tiny, **OPTIONS, attention=attention) as runtime:  # type: ignore[arg-type]
        prompt_filter = runtime._engine.prompt_filter
        assert prompt_filter is not None and runtime.plan.cache_filter_pass
        fresh = ask(runtime, ANOTHER), runtime.retained_spans()
        runtime.trim("moderate")
        assert prompt_filter._model.num_tokens == 0
        first = ask(runtime, QUESTION)
        read = prompt_filter._model.num_tokens
        again = ask(runtime, ANOTHER), runtime.retained_spans()
        assert first.stats.prompt_tokens == read > 1100
        assert again[0].token_ids == fresh[0].token_ids
        assert again[1] == fresh[1]


def test_a_stopped_filter_pass_leaves_the_runtime_usable(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Runtime.open(tiny, **OPTIONS, attention=POLICY) as runtime:  # type: ignore[arg-type]
        expected = ask(runtime, QUESTION).token_ids
        assert runtime._engine.prompt_filter is not None
        reader = runtime._engine.prompt_filter._model
        forward, passes = reader.forward, []
        runtime.trim("moderate")

        def interrupted(token_ids: tuple[int, ...]) -> object:
            passes.append(token_ids)
            if len(passes) == 3:
                raise KeyboardInterrupt
            return forward(token_ids)

        monkeypatch.setattr(reader, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(runtime, QUESTION)
        monkeypatch.undo()
        assert ask(runtime, QUESTION).token_ids == expected


PEAK = """
from lowtide import Gem, GenerationResult, Runtime
from lowtide.memory.plan.line import FILTER_PREFILL
options = dict(memory={memory!r}, threads=1, attention={attention})
with Runtime.open({path!r}, **options) as runtime:
    message = [dict(role="user", content={text!r})]
    for _ in range(2):
        result = GenerationResult.of(runtime.chat(message, max_tokens=4, temperature=0))
    rows = {{row.component: row.num_bytes for row in runtime.plan.rows}}
    print(runtime.plan.total_bytes, rows.get(FILTER_PREFILL, 0), *result.token_ids)
"""


def test_the_filter_pass_takes_the_cache_of_its_layers(tmp_path: Path) -> None:
    shape = Shape(layers=12, width=256, heads=4, kv_heads=4, feed_forward=256, context=8192)
    folder = write_decoder(tmp_path / "deep", "gqa", shape, chat_template=CHAT_TEMPLATE)
    text = "".join(SENTENCES) + "What floats?"
    printed, peaks = {}, {}
    for name, attention in (("dense", "'dense'"), ("gem", "Gem(k=400, layer=2)")):
        code = PEAK.format(attention=attention, path=str(folder), text=text, memory="2GiB")
        done = run_python(code)
        assert done.code == 0, done.stderr
        printed[name], peaks[name] = list(map(int, done.stdout.split())), done.peak_bytes
    for name, peak in peaks.items():
        assert peak <= printed[name][0], name
    # About 4,200 tokens take 1 KiB in each of 12 layers, in 3 layers a quarter, the retained ones a tenth.
    assert peaks["gem"] < peaks["dense"] - (20 << 20)
    assert printed["gem"][1] > 3 * 8192 * 1024


def test_the_filter_pass_is_a_line_of_the_plan(tiny: Path) -> None:
    planned = run_lowtide(
        *("plan", str(tiny), "--attention", "gem:k=300,layer=1", "-t", "1", "--json")
    )
    assert planned.code == 0, planned.stderr
    plan = json.loads(planned.stdout)
    rows = {row["component"]: row["bytes"] for row in plan["rows"]}
    assert rows[FILTER_PREFILL] > 0 and plan["cache_filter_pass"]
    words = ("--attention", "gem:k=300,layer=1", "-t", "1", "--memory")
    bound = json.loads(run_lowtide("plan", str(tiny), *words, "60MiB", "--json").stdout)
    prompt = json.dumps(QUESTION)[:1500].encode()
    done = run_lowtide(
        "run", str(tiny), "-n", "4", *words, str(bound["lower_bound_bytes"]), stdin=prompt
    )
    assert done.code in (0, 2), done.stderr  # a prompt without room is refused
    assert done.peak_bytes <= bound["lower_bound_bytes"]


def test_commands(tiny: Path) -> None:
    words = ("--attention", "gem:k=300,layer=1", "-t", "1", "-n", "4", "--temp", "0")
    asked = QUESTION[0]["content"].encode()
    done = run_lowtide("run", str(tiny), *words, "--explain", stdin=asked)
    assert done.code == 0 and "(300 retained)" in done.stderr, done.stderr
    as_json = run_lowtide("run", str(tiny), *words, "--explain", "--json", stdin=asked)
    assert sum(passage["tokens"] for passage in json.loads(as_json.stdout)["retained_spans"]) == 300
    profiled = run_lowtide("profile", str(tiny), *words, "--json", "-p", asked.decode())
    assert profiled.code == 0, profiled.stderr
    assert json.loads(profiled.stdout)["retention_map"]["num_retained"] == 300


def test_retained_tokens_are_evaluated(tiny: Path) -> None:
    config = LoadConfig(
        memory="2GiB",
        context=640 + SPARE_TOKENS,
        threads=1,
        attention="dense",
        attention_memory=GemMemory(),
        compared_tokens=1,
    )
    reports = {}
    for k in (100, 319):
        engine = Engine(plan_reference(tiny, config))
        policy = Gem(k=k, layer=1, min_prompt=0).resolve(engine.model.spec)
        found = evaluate(engine, policy, context=640, windows=2, kinds=())
        engine.close()
        reports[k] = found.to_dict()
    assert reports[100]["tokens"] == 128 and reports[100]["dense_nll"] == reports[319]["dense_nll"]
    assert reports[100]["nll"] != reports[319]["nll"]


def test_a_graph_that_cannot_be_rewritten_says_why(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", "decomposed")
    with pytest.raises(BadOption, match="attention is 'gem'.*its own"):
        Runtime.open(folder, memory="2GiB", attention="gem")


@pytest.mark.real
def test_a_passkey_is_in_the_retained_tokens(tmp_path: Path, smollm2_spec: ModelSpec) -> None:
    folder = convert(smollm2_spec, tmp_path / "smollm2").folder
    found = Gem().resolve(read_spec(folder))
    assert found.layer == 7 and "calibrated" in str(found)  # like the GGUF file
    asked = [{"role": "user", "content": LONG + "What is the secret pass key in the text?"}]
    options = {**OPTIONS, "context": 4096, "attention": Gem(k=400, layer=7)}
    with Runtime.open(folder, **options) as runtime:  # type: ignore[arg-type]
        result = ask(runtime, asked, 24)
        assert "48213" in result.text
        assert result.stats.prompt_tokens > 1400 and result.stats.retained_tokens == 400
        passages = runtime.retained_spans()
    assert [p for p in passages if "48213" in p.text and p.score > 0.05]
