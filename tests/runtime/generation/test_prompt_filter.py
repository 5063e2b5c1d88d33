"""Long prompts under `gem`: what is retained, what is answered, what it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import run_lowtide, run_python

from lowtide import Gem, GenerationResult, Profiler, Runtime
from lowtide.memory.os.kv_pages import can_use_demand_zero
from lowtide.memory.plan.line import COMPUTE, FILTER_PREFILL
from lowtide.memory.units import MIB
from lowtide.models.errors import BadOption
from lowtide.runtime.profiling.export import profile_page

pytestmark = pytest.mark.real

SENTENCES = [f"Boat {i} left the harbour with {i * 7 % 100} crates of fish. " for i in range(90)]
PASSKEY = "The secret pass key is 48213. Remember it: 48213 is the pass key. "
TEXT = "".join([*SENTENCES[:40], PASSKEY, *SENTENCES[40:]])
QUESTION = [{"role": "user", "content": TEXT + "What is the secret pass key in the text?"}]


@pytest.fixture(scope="module")
def runtime(smollm2: Path) -> Iterator[Runtime]:
    with Runtime.open(smollm2, memory="2GiB", context=4096, attention=Gem(k=400)) as filtering:
        yield filtering


def ask(runtime: Runtime, messages: list[dict[str, str]], num_tokens: int = 24) -> GenerationResult:
    return GenerationResult.of(runtime.chat(messages, max_tokens=num_tokens, temperature=0))


def test_a_passkey_is_found_among_the_retained_tokens(runtime: Runtime) -> None:
    result = ask(runtime, QUESTION)
    assert "48213" in result.text
    assert result.stats.prompt_tokens > 1400 and result.stats.retained_tokens == 400
    assert len(runtime._session.token_ids) < 400 + 24
    spans = runtime.retained_spans()
    assert sum(span.tokens for span in spans) == 400
    assert [p for p in spans if "48213" in p.text and p.score > 0.05]
    assert "secret pass key in the text?" in spans[-1].text


def test_every_question_filters_the_whole_chat_again(runtime: Runtime) -> None:
    first = ask(runtime, QUESTION)
    again = [*QUESTION, {"role": "assistant", "content": first.text}]
    again.append({"role": "user", "content": "How many crates did Boat 3 leave with?"})
    second = ask(runtime, again)
    assert second.stats.prompt_tokens > first.stats.prompt_tokens
    assert second.stats.retained_tokens == 400
    assert [p for p in runtime.retained_spans() if "Boat 3 left" in p.text]
    short = ask(runtime, [{"role": "user", "content": "What floats?"}])
    assert short.stats.retained_tokens == short.stats.prompt_tokens


def test_a_k_beyond_the_prompt_retains_the_whole_prompt(smollm2: Path) -> None:
    answers = []
    short = [{"role": "user", "content": "".join(SENTENCES[:30]) + "How many boats are there?"}]
    for attention in ("dense", Gem(k=3000, min_prompt=0)):
        with Runtime.open(smollm2, memory="2GiB", context=4096, attention=attention) as filtering:
            answers.append(ask(filtering, short, 16).token_ids)
    assert answers[0] == answers[1]


def test_an_interrupted_filter_pass_leaves_the_runtime_usable(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ask(runtime, QUESTION).token_ids
    assert runtime._engine.prompt_filter is not None
    filter_model = runtime._engine.prompt_filter._model
    forward, passes = filter_model.forward, []
    runtime.trim("moderate")

    def interrupted(token_ids: tuple[int, ...]) -> object:
        passes.append(token_ids)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return forward(token_ids)

    monkeypatch.setattr(filter_model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(runtime, QUESTION)
    monkeypatch.undo()
    assert ask(runtime, QUESTION).token_ids == expected


ANOTHER = [{"role": "user", "content": TEXT + "How many crates did Boat 3 leave with?"}]


def test_another_question_on_the_same_text_computes_only_its_own_tokens(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runtime.plan.cache_filter_pass and runtime._engine.prompt_filter is not None
    filter_model = runtime._engine.prompt_filter._model
    runtime.trim("moderate")
    fresh = ask(runtime, ANOTHER), runtime.retained_spans()
    runtime.trim("moderate")
    assert filter_model.num_tokens == 0
    ask(runtime, QUESTION)
    num_read = filter_model.num_tokens
    forward, rows = filter_model.forward, []

    def counted(token_ids: tuple[int, ...]) -> object:
        rows.append(len(token_ids))
        return forward(token_ids)

    monkeypatch.setattr(filter_model, "forward", counted)
    again = ask(runtime, ANOTHER), runtime.retained_spans()
    assert sum(rows) < 64 < num_read
    assert again[0].token_ids == fresh[0].token_ids and again[1] == fresh[1]


def test_an_answer_lists_the_retained_spans(runtime: Runtime, smollm2: Path) -> None:
    chunks = list(runtime.chat(QUESTION, max_tokens=3, temperature=0, explain=True))
    assert [bool(chunk.retained) for chunk in chunks] == [False, False, True]
    assert list(chunks[-1].retained) == runtime.retained_spans()
    assert not ask(runtime, QUESTION).retained
    with (
        Runtime.open(smollm2, memory="2GiB", context=512) as other,
        pytest.raises(BadOption, match="open with attention='gem'"),
    ):
        other.chat(QUESTION, explain=True)


def test_a_profile_shows_where_the_retained_tokens_are(smollm2: Path) -> None:
    profiler = Profiler()
    attention = Gem(k=400)
    with Runtime.open(
        smollm2, memory="2GiB", context=4096, attention=attention, profiler=profiler
    ) as filtering:
        ask(filtering, QUESTION, 2)
        spans = tuple(filtering.retained_spans())
    report = profiler.report()
    retention_map = report.retention_map
    assert (
        retention_map is not None
        and retention_map.num_retained == 400
        and retention_map.spans == spans
    )
    assert (
        len(retention_map.scores)
        == len(retention_map.retained)
        == -(-retention_map.num_tokens // retention_map.bin_tokens)
    )
    sizes = [retention_map.bin_tokens] * (len(retention_map.retained) - 1)
    sizes.append(retention_map.num_tokens - sum(sizes))
    assert sum(s * k for s, k in zip(sizes, retention_map.retained, strict=True)) == pytest.approx(
        400
    )
    assert json.loads(json.dumps(report.to_dict()))["retention_map"]["num_retained"] == 400
    measured = {row.component: row.num_bytes for row in report.measured}
    assert (measured[COMPUTE] or 0) > 0
    assert (
        0
        < (measured[FILTER_PREFILL] or 0)
        < next(row.num_bytes for row in report.plan.rows if row.component == FILTER_PREFILL)
    )
    page = profile_page(report)
    assert "Retained tokens of the last prompt" in page and "Remember it: 48213" in page


def test_a_text_is_continued_only_with_continues(runtime: Runtime, smollm2: Path) -> None:
    with pytest.raises(BadOption, match="ask in a chat, or open with"):
        runtime.generate("Once upon a time")
    forced = Gem(continues=True)
    with Runtime.open(smollm2, memory="2GiB", context=512, attention=forced) as filtering:
        assert filtering.generate("Once upon a time", max_tokens=4).token_ids


PEAK = """
from lowtide import Gem, GenerationResult, Runtime
with Runtime.open({path!r}, memory={memory}, context=4096, threads=1, attention={attention}) as runtime:
    message = [dict(role="user", content={text!r})]
    for _ in range(2):
        result = GenerationResult.of(runtime.chat(message, max_tokens=4, temperature=0))
    held = runtime._engine.prompt_filter._model.num_tokens if runtime._engine.prompt_filter else 0
    print(runtime.plan.cache_filter_pass, runtime.plan.total_bytes, held, *result.token_ids)
"""


@pytest.mark.skipif(
    not can_use_demand_zero(), reason="this system allocates the whole cache at once"
)
def test_the_filter_takes_the_cache_of_its_layers_and_keeps_it_where_there_is_room(
    smollm2: Path,
) -> None:
    text = "".join(SENTENCES * 2) + "What floats?"
    printed, peaks = {}, {}
    for name, attention, memory in (
        ("dense", "'dense'", "'2GiB'"),
        ("roomy", "Gem(k=400)", "'2GiB'"),
        ("tight", "Gem(k=400)", "'230MiB'"),
    ):
        code = PEAK.format(attention=attention, path=str(smollm2), text=text, memory=memory)
        done = run_python(code)
        assert done.code == 0, done.stderr
        printed[name], peaks[name] = done.stdout.split(), done.peak_bytes
    assert [printed[name][0] for name in ("roomy", "tight")] == ["True", "False"]
    assert int(printed["roomy"][2]) > 2800 and printed["tight"][2] == "0"
    assert printed["roomy"][3:] == printed["tight"][3:]
    for name, peak in peaks.items():
        assert peak <= int(printed[name][1]), name
    # About 2,900 tokens of 30 layers take 65 MiB, of 8 layers 17, and 400 retained tokens of 30 take 9.
    assert peaks["tight"] < peaks["roomy"] < peaks["dense"] - 25 * MIB


def test_the_command_shows_the_retained_spans() -> None:
    arguments = (
        "run",
        "-t",
        "1",
        "--attention",
        "gem:k=400",
        "-c",
        "4096",
        "-n",
        "16",
        "--temp",
        "0",
    )
    prompt = QUESTION[0]["content"].encode()
    done = run_lowtide(*arguments, "--explain", "--memory", "1GiB", stdin=prompt)
    assert done.code == 0, done.stderr
    assert "48213" in done.stdout and "(400 retained)" in done.stderr
    assert "Remember it: 48213" in done.stderr
    as_json = run_lowtide(*arguments, "--explain", "--json", "--memory", "1GiB", stdin=prompt)
    roomy = json.loads(as_json.stdout)["retained_spans"]
    assert sum(span["tokens"] for span in roomy) == 400


def test_explain_needs_gem() -> None:
    done = run_lowtide("run", "--explain", "-p", "Hi")
    assert done.code == 2 and "--explain shows what --attention gem retained" in done.stderr
    assert run_lowtide("evaluate", "--attention", "gem", "-c", "512").code == 2
    assert run_lowtide("bench", "--attention", "gem", "-d", "512").code == 2
    assert "layer is 30" in run_lowtide("run", "--attention", "gem:layer=30", "-p", "Hi").stderr
