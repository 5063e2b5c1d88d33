"""A short chat with the fake model, as it is saved."""

from __future__ import annotations

from lowtide import GenerationResult, Runtime

TURNS = [{"role": "user", "content": "a"}]
MESSAGES = [*TURNS, {"role": "assistant", "content": "One."}]
NEXT = [*MESSAGES, {"role": "user", "content": "b"}]


def chat(runtime: Runtime, messages: list[dict[str, str]]) -> GenerationResult:
    return GenerationResult.of(runtime.chat(messages, temperature=0))
