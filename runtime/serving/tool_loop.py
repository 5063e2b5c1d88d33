"""run_tools: answers a chat, runs the tools that the model calls, and goes on with their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from lowtide.models.arguments.names import option
from lowtide.models.arguments.values import shown
from lowtide.models.chat_template import Message
from lowtide.models.errors import BadOption
from lowtide.runtime.errors import PromptTooLong
from lowtide.runtime.generation.statistics import Statistics
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.runtime import Runtime
from lowtide.runtime.serving.deltas import Answer, Call, CallDeltas, Delta, delta_of
from lowtide.runtime.tools.tool import Tool
from lowtide.runtime.tools.use import ToolUse

MAX_ROUNDS = 8
"""Most answers of one chat, the last one included, where the caller does not say otherwise."""
NOT_ALLOWED = "Error: the user did not allow this call."
RESULT_SHARE = 1 / 2
"""Most of the context that one result may take: the chat before it and the next answer need the rest."""


@dataclass(frozen=True, slots=True)
class ToolRun:
    """What a chat with tools came to."""

    text: str
    """The text of the last answer."""
    finish_reason: str
    """That of the last answer: "stop", "length", "context" or "memory"; "rounds" where it called tools again, and the
    rounds were used up."""
    messages: tuple[dict[str, Any], ...]
    """What was added to the chat: answers with "tool_calls", results with the role "tool", and the last answer."""
    calls: tuple[Call, ...]
    """The calls of tools, in order; also those that were not allowed."""
    stats: Statistics
    """Counts and times of the last answer."""


def run_tools(
    runtime: Runtime,
    messages: Sequence[Message] | str,
    tools: Sequence[Any],
    params: SamplingParams | None = None,
    *,
    tool_choice: str = "auto",
    max_rounds: int = MAX_ROUNDS,
    allow: Callable[[Call], bool] | None = None,
    on_text: Callable[[str], None] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    **named: Any,
) -> ToolRun:
    """Answer a chat with functions of Python that the model may call; run what it calls, until it calls nothing.

    `allow` is asked before each call, and `on_text` gets the text while it is written. An error of a function, a call
    that is not allowed, and a result of more than half the context are errors that the model reads. A `tool_choice`
    that requires a call does so in the first answer. The other arguments are those of `Runtime.chat`.

    Raises `BadOption` for tools without a function, and what `Runtime.chat` raises.
    """
    if isinstance(max_rounds, bool) or not isinstance(max_rounds, int) or max_rounds < 1:
        raise BadOption(f"{option('max_rounds')} is {shown(max_rounds)}; it must be at least 1")
    chat: list[Message] = (
        [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    )
    syntax = runtime.call_syntax
    added: list[dict[str, Any]] = []
    calls: list[Call] = []
    for _ in range(max_rounds):
        use = ToolUse(syntax, tools, tool_choice)
        _require_functions(use.tools)
        reader = use.reader()
        read = delta_of if reader is None else CallDeltas(reader)
        answer = Answer()
        chunks = runtime.chat(
            [*chat, *added],
            params,
            tools=use,
            template_arguments=template_arguments,
            **named,
        )
        with closing(chunks):
            for chunk in chunks:
                delta: Delta = read(chunk)
                answer.add(delta)
                if on_text is not None and delta.text:
                    on_text(delta.text)
        finish = answer.finish
        assert finish is not None  # the last chunk has it
        stats = finish.stats
        if finish.reason != "tool_calls":
            reason = finish.own_reason
            added.append({"role": "assistant", "content": answer.text})
            break
        calls += answer.calls
        added.append(_calling(answer))
        added += [_result(runtime, call, use.tools, allow) for call in answer.calls]
        tool_choice, reason = ("none" if tool_choice == "none" else "auto"), "rounds"
    return ToolRun(answer.text, reason, tuple(added), tuple(calls), stats)


def _require_functions(tools: Sequence[Tool]) -> None:
    name = next((tool.name for tool in tools if tool.run is None), None)
    if name is not None:
        raise BadOption(
            f"the tool {name} is a schema without a function, which cannot be run: pass a function, or call "
            "Runtime.chat and run it yourself"
        )


def _calling(answer: Answer) -> dict[str, Any]:
    """Return an answer as a message of the history."""
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in answer.calls
    ]
    return {"role": "assistant", "content": answer.text, "tool_calls": calls}


def _result(
    runtime: Runtime, call: Call, tools: Sequence[Tool], allow: Callable[[Call], bool] | None
) -> dict[str, Any]:
    """Run a call, where that is allowed, and return its result as a message."""
    tool = next(tool for tool in tools if tool.name == call.name)
    allowed = allow is None or allow(call)
    content = _short_enough(runtime, call, tool.call(call.arguments)) if allowed else NOT_ALLOWED
    return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content}


def _short_enough(runtime: Runtime, call: Call, result: str) -> str:
    """Return a result, or an error in place of one that leaves the chat no room: a part of it might mislead."""
    most = int(RESULT_SHARE * runtime.plan.context)
    try:
        num_tokens = runtime.count_tokens(result)
    except PromptTooLong as error:
        num_tokens = error.num_tokens
    if num_tokens <= most:
        return result
    return f"Error: the result of {call.name} has {num_tokens:,} tokens, and at most {most:,} can be read: ask for less"
