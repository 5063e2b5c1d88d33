"""run_tools over a fake model: rounds, errors of functions, questions before calls."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("llguidance")

from lowtide import FakeModel, Runtime, ToolRun, run_tools
from lowtide.models.errors import BadOption


def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    if a < 0:
        raise ValueError("a is below 0")
    return a + b


def written(name: str, **arguments: Any) -> str:
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


def run(*replies: str, **options: Any) -> tuple[ToolRun, str]:
    """Return the run, and the last prompt."""
    model = FakeModel(replies, context=4096)
    with Runtime.open(model, memory="8GiB") as runtime:
        done = run_tools(runtime, "What is 2 + 3?", [add], **options)
        return done, model.tokenizer.decode(model._tokens)


def test_a_called_function_runs_and_its_result_is_told() -> None:
    texts: list[str] = []
    done, prompt = run(
        "Well. " + written("add", a=2, b=3), "It is 5.", on_text=texts.append, temperature=0
    )
    assert (done.text, done.finish_reason) == ("It is 5.", "stop")
    assert [(call.name, json.loads(call.arguments)) for call in done.calls] == [
        ("add", {"a": 2, "b": 3})
    ]
    called, result, last = done.messages
    assert called["content"] == "Well." and called["tool_calls"][0]["id"] == result["tool_call_id"]
    assert result["content"] == "5" and last == {"role": "assistant", "content": "It is 5."}
    assert "".join(texts) == "Well.It is 5."
    assert "Add two numbers." in prompt and "<tool_response>\n5\n</tool_response>" in prompt


def test_an_error_of_a_function_is_told_to_the_model() -> None:
    done, prompt = run(written("add", a=-1), "I cannot.", temperature=0)
    assert done.text == "I cannot."
    assert "Error: add failed: ValueError: a is below 0" in prompt


def test_a_call_that_is_not_allowed_does_not_run() -> None:
    asked = []

    def allow(call: Any) -> bool:
        asked.append((call.name, json.loads(call.arguments)))
        return False

    done, _ = run(written("add", a=1), "Then not.", allow=allow, temperature=0)
    assert asked == [("add", {"a": 1})]
    assert done.messages[1]["content"] == "Error: the user did not allow this call."


def test_rounds_end() -> None:
    done, _ = run(written("add", a=1), max_rounds=3, temperature=0)
    assert done.finish_reason == "rounds" and len(done.calls) == 3
    assert [message["role"] for message in done.messages] == ["assistant", "tool"] * 3


def test_a_required_call_is_the_first_answer_alone() -> None:
    done, _ = run("It is 5.", tool_choice="required", temperature=0)
    assert [call.name for call in done.calls] == ["add"] and done.text == "It is 5."


def test_none_calls_nothing() -> None:
    text = written("add", a=1)
    done, prompt = run(text, tool_choice="none", temperature=0)
    assert done.text == text and not done.calls and "Add two numbers." not in prompt


@pytest.mark.parametrize("rounds", [0, True, "2"])
def test_wrong_rounds_are_refused(rounds: Any) -> None:
    with pytest.raises(BadOption, match="at least 1"):
        run("x", max_rounds=rounds)


def test_a_schema_alone_cannot_run() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    with (
        Runtime.open(FakeModel(["x"], context=4096), memory="8GiB") as runtime,
        pytest.raises(BadOption, match="the tool f is a schema without a function"),
    ):
        run_tools(runtime, "x", [tool])


def test_answers_that_run_together_may_call_tools() -> None:
    model = FakeModel([written("add", a=2, b=3), "It is 5."], context=4096)
    with Runtime.open(model, memory="8GiB", sequences=2) as runtime:
        done = run_tools(runtime, "What is 2 + 3?", [add], temperature=0)
    assert done.text == "It is 5." and len(done.calls) == 1


@pytest.mark.parametrize("length", [100, 10_000, 10_000_000])
def test_a_result_that_is_too_long_is_an_error_for_the_model(length: int) -> None:
    def read() -> str:
        """Read a file."""
        return "x" * length

    model = FakeModel([written("read"), "I shall ask for less."], context=4096)
    with Runtime.open(model, memory="8GiB") as runtime:
        done = run_tools(runtime, "Read.", [read], temperature=0)
    content = done.messages[1]["content"]
    if length == 100:
        assert content == "x" * length
    else:
        assert content.startswith("Error: the result of read has ")
        assert content.endswith(" tokens, and at most 2,048 can be read: ask for less")
    assert done.text == "I shall ask for less."
