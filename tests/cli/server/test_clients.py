"""Programs that people use, as clients of the real server with the real model.

Those that are not installed are skipped: pip install openai ollama litellm langchain-openai instructor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_process import Process, started

pytestmark = pytest.mark.real
QUESTION: list[Any] = [{"role": "user", "content": "Why is the sea salty?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
        },
    },
}
SETTINGS: dict[str, Any] = {"model": "smollm2", "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with started(Path("smollm2"), "--context", "2048") as process:
        yield process


@pytest.fixture(scope="module")
def expected(server: Process) -> str:
    """What a client without any library reads."""
    reply = server.json("/v1/chat/completions", {**SETTINGS, "messages": QUESTION})
    text = reply["choices"][0]["message"]["content"]
    assert len(text) > 20
    return str(text)


@pytest.fixture
def openai(server: Process) -> Iterator[Any]:
    module = pytest.importorskip("openai")
    with module.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


def test_openai_whole_and_streamed(openai: Any, expected: str) -> None:
    whole = openai.chat.completions.create(messages=QUESTION, **SETTINGS)
    assert whole.choices[0].message.content == expected
    assert whole.usage.completion_tokens == 24 and whole.choices[0].finish_reason == "length"
    parts = openai.chat.completions.create(
        messages=QUESTION, stream=True, stream_options={"include_usage": True}, **SETTINGS
    )
    chunks = list(parts)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected and chunks[-1].usage.completion_tokens == 24
    module = pytest.importorskip("openai")
    with openai.chat.completions.stream(messages=QUESTION, **SETTINGS) as stream:
        events = [event for event in stream if event.type == "content.delta"]
        assert "".join(event.delta for event in events) == expected
        with pytest.raises(module.LengthFinishReasonError):  # of the package: the answer is cut
            stream.get_final_completion()
    assert [model.id for model in openai.models.list()] == ["smollm2"]


def test_openai_asynchronous(server: Process, expected: str) -> None:
    module = pytest.importorskip("openai")

    async def ask() -> list[str]:
        async with module.AsyncOpenAI(base_url=server.url + "/v1", api_key="any") as client:
            calls = [
                client.chat.completions.create(messages=QUESTION, **SETTINGS) for _ in range(4)
            ]
            return [reply.choices[0].message.content for reply in await asyncio.gather(*calls)]

    assert asyncio.run(ask()) == [expected] * 4


def test_openai_parses_into_a_class(openai: Any) -> None:
    pydantic = pytest.importorskip("pydantic")
    person = pydantic.create_model("Person", name=(str, ...), age=(int, ...))
    reply = openai.chat.completions.parse(
        messages=[{"role": "user", "content": "Ann is 31 years old."}],
        response_format=person,
        **{**SETTINGS, "max_tokens": 60},
    )
    assert isinstance(reply.choices[0].message.parsed, person)


def test_openai_calls_tools(openai: Any) -> None:
    asked = {**SETTINGS, "max_tokens": 80, "tools": [WEATHER], "tool_choice": "required"}
    messages = [{"role": "user", "content": "How is the weather in Paris?"}]
    message = openai.chat.completions.create(messages=messages, **asked).choices[0].message
    (call, *_) = message.tool_calls
    assert call.function.name == "get_weather" and "city" in call.function.arguments
    with openai.chat.completions.stream(messages=messages, **asked) as stream:
        (streamed, *_) = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.name == "get_weather"
    assert streamed.function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    history = [*messages, message.model_dump(exclude_none=True), result]
    answered = openai.chat.completions.create(messages=history, tools=[WEATHER], **SETTINGS)
    assert answered.choices[0].message.content or answered.choices[0].message.tool_calls


def test_openai_responses_completions_and_errors(openai: Any) -> None:
    module = pytest.importorskip("openai")
    made = openai.responses.create(
        model="smollm2", input="Say hello.", temperature=0, max_output_tokens=12
    )
    assert made.output_text and made.status in ("completed", "incomplete")
    text = openai.completions.create(prompt="Once upon a", **SETTINGS).choices[0].text
    assert text
    with pytest.raises(module.NotFoundError, match="there is no model"):
        openai.chat.completions.create(messages=QUESTION, model="other")
    with pytest.raises(module.BadRequestError, match="context"):
        openai.chat.completions.create(
            messages=[{"role": "user", "content": "sea " * 5000}], model="smollm2"
        )


def test_ollama(server: Process, expected: str) -> None:
    client = pytest.importorskip("ollama").Client(host=server.url)
    options = {"temperature": 0, "num_predict": 24}
    whole = client.chat(model="smollm2", messages=QUESTION, options=options)
    assert whole.message.content == expected and whole.eval_count == 24
    parts = client.chat(model="smollm2", messages=QUESTION, options=options, stream=True)
    assert "".join(part.message.content for part in parts) == expected
    assert [one.model for one in client.list().models] == ["smollm2"]
    shown = client.generate(model="smollm2", prompt="Hi", options=options)
    assert shown.response


def test_litellm(server: Process, expected: str) -> None:
    litellm = pytest.importorskip("litellm")
    settings = {**SETTINGS, "model": "openai/smollm2", "api_base": server.url + "/v1"}
    reply = litellm.completion(messages=QUESTION, api_key="any", **settings)
    assert reply.choices[0].message.content == expected
    parts = litellm.completion(messages=QUESTION, api_key="any", stream=True, **settings)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected


def test_langchain(server: Process, expected: str) -> None:
    module = pytest.importorskip("langchain_openai")
    chat = module.ChatOpenAI(
        base_url=server.url + "/v1", api_key="any", model="smollm2", temperature=0, max_tokens=24
    )
    question = QUESTION[0]["content"]
    assert chat.invoke(question).content == expected
    assert "".join(part.content for part in chat.stream(question)) == expected
    called = chat.bind_tools([WEATHER], tool_choice="required").invoke(
        "How is the weather in Paris?", max_tokens=80
    )
    assert called.tool_calls[0]["name"] == "get_weather"


def test_instructor(server: Process) -> None:
    instructor = pytest.importorskip("instructor")
    pydantic, openai = pytest.importorskip("pydantic"), pytest.importorskip("openai")
    person = pydantic.create_model("Person", name=(str, ...), age=(int, ...))
    client = instructor.from_openai(openai.OpenAI(base_url=server.url + "/v1", api_key="any"))
    found = client.chat.completions.create(
        model="smollm2",
        response_model=person,
        messages=[{"role": "user", "content": "Ann is 31 years old."}],
        temperature=0,
        max_tokens=80,
        max_retries=0,
    )
    assert isinstance(found, person)
