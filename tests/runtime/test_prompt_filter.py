"""Long prompts under `gem`: what is kept, what is answered, what it takes, from the front door."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import run_lowtide, run_python

from lowtide import Gem, GenerationResult, Runtime
from lowtide.memory.units import MIB
from lowtide.memory.untouched_buffers import can_leave_untouched
from lowtide.models.errors import BadOption

SENTENCES = [f"Boat {i} left the harbour with {i * 7 % 100} crates of fish. " for i in range(90)]
NEEDLE = "The secret pass key is 48213. Remember it: 48213 is the pass key. "
TEXT = "".join([*SENTENCES[:40], NEEDLE, *SENTENCES[40:]])
QUESTION = [{"role": "user", "content": TEXT + "What is the secret pass key in the text?"}]


@pytest.fixture(scope="module")
def runtime(smollm2: Path) -> Iterator[Runtime]:
    with Runtime.open(smollm2, memory="2GiB", context=4096, attention=Gem(k=400)) as opened:
        yield opened


def ask(runtime: Runtime, messages: list[dict[str, str]], num_tokens: int = 24) -> GenerationResult:
    return GenerationResult.of(runtime.chat(messages, max_tokens=num_tokens, temperature=0))


def test_a_pass_key_is_found_in_what_is_kept(runtime: Runtime) -> None:
    result = ask(runtime, QUESTION)
    assert "48213" in result.text
    assert result.stats.prompt_tokens > 1400 and result.stats.kept_tokens == 400
    assert len(runtime._session.token_ids) < 400 + 24
    passages = runtime.kept_passages()
    assert sum(passage["tokens"] for passage in passages) == 400
    assert [p for p in passages if "48213" in p["text"] and p["score"] > 0.05]
    assert "secret pass key in the text?" in passages[-1]["text"]


def test_every_question_filters_the_whole_conversation_again(runtime: Runtime) -> None:
    first = ask(runtime, QUESTION)
    again = [*QUESTION, {"role": "assistant", "content": first.text}]
    again.append({"role": "user", "content": "How many crates did Boat 3 leave with?"})
    second = ask(runtime, again)
    assert second.stats.prompt_tokens > first.stats.prompt_tokens
    assert second.stats.kept_tokens == 400
    assert [p for p in runtime.kept_passages() if "Boat 3 left" in p["text"]]
    short = ask(runtime, [{"role": "user", "content": "What floats?"}])
    assert short.stats.kept_tokens == short.stats.prompt_tokens


def test_a_k_beyond_the_prompt_is_the_whole_prompt(smollm2: Path) -> None:
    answers = []
    for attention in ("dense", Gem(k=3000)):
        with Runtime.open(smollm2, memory="2GiB", context=4096, attention=attention) as opened:
            answers.append(ask(opened, QUESTION, 16).token_ids)
    assert answers[0] == answers[1]


def test_a_stopped_filter_pass_leaves_the_runtime_usable(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ask(runtime, QUESTION).token_ids
    forward, passes = runtime._model.forward, []

    def interrupted(token_ids: tuple[int, ...]) -> object:
        passes.append(token_ids)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return forward(token_ids)

    monkeypatch.setattr(runtime._model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(runtime, QUESTION)
    monkeypatch.undo()
    assert ask(runtime, QUESTION).token_ids == expected


def test_a_text_is_continued_only_where_that_is_meant(runtime: Runtime, smollm2: Path) -> None:
    with pytest.raises(BadOption, match="ask in a chat, or set gem:continues=1"):
        runtime.generate("Once upon a time")
    forced = Gem(continues=1)
    with Runtime.open(smollm2, memory="2GiB", context=512, attention=forced) as opened:
        assert opened.generate("Once upon a time", max_tokens=4).token_ids


PEAK = """
from lowtide import GenerationResult, Runtime
from lowtide.attention.gem import Gem
attention = {attention}
with Runtime.open({path!r}, memory="2GiB", context=8192, threads=1, attention=attention) as runtime:
    text = {text!r}
    message = [dict(role="user", content=text)]
    print(len(GenerationResult.of(runtime.chat(message, max_tokens=4, temperature=0)).token_ids))
"""


@pytest.mark.skipif(not can_leave_untouched(), reason="the cache is whole from the start here")
def test_the_first_pass_takes_the_cache_of_its_layers_alone(smollm2: Path) -> None:
    text = "".join(SENTENCES * 2) + "What floats?"
    peaks = {}
    for attention in ("'dense'", "Gem(k=400)"):
        done = run_python(PEAK.format(attention=attention, path=str(smollm2), text=text))
        assert done.code == 0, done.stderr
        peaks[attention] = done.peak_bytes
    # About 2,900 tokens of 30 layers take 65 MiB, of 8 layers 17; scores take a few.
    assert peaks["Gem(k=400)"] < peaks["'dense'"] - 30 * MIB


def test_the_command_shows_what_was_kept() -> None:
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
    asked = QUESTION[0]["content"].encode()
    done = run_lowtide(*arguments, "--explain", "--memory", "1GiB", stdin=asked)
    assert done.code == 0, done.stderr
    assert "48213" in done.stdout and "(400 kept)" in done.stderr
    assert "Remember it: 48213" in done.stderr
    as_json = run_lowtide(*arguments, "--explain", "--json", "--memory", "1GiB", stdin=asked)
    kept = json.loads(as_json.stdout)["kept"]
    assert sum(passage["tokens"] for passage in kept) == 400


def test_asking_to_explain_another_policy_is_a_mistake() -> None:
    done = run_lowtide("run", "--explain", "-p", "Hi")
    assert done.code == 2 and "--explain shows what --attention gem kept" in done.stderr
    assert run_lowtide("evaluate", "--attention", "gem", "-c", "512").code == 2
    assert run_lowtide("bench", "--attention", "gem", "-d", "512").code == 2
    assert "layer is 30" in run_lowtide("run", "--attention", "gem:layer=30", "-p", "Hi").stderr
