"""The header of a chat file, and the memory that reading it takes."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from lowtide.memory.plan.estimates import JSON_COPIES
from lowtide.runtime.generation.turns import LastTurn
from lowtide.runtime.sessions.file import ChatHeader, Transcript


def header(text: str, token_ids: list[int], messages: list[str]) -> ChatHeader:
    return ChatHeader(
        properties={"model": "m"},
        num_tokens=len(token_ids),
        exact_until=1,
        last=LastTurn(text, token_ids, len(messages), [2, 3]),
        transcript=Transcript(
            model="m", messages=tuple({"role": "user", "content": m} for m in messages)
        ),
    )


HEADERS = {
    "text": header("word " * 20_000, [], ["word " * 20_000]),
    "wide text": header("привет " * 20_000, [], ["a" * 100_000 + "😀" * 20_000]),
    "tokens": header("", [i * 7919 % 49152 for i in range(8_000)], []),
    "small tokens": header("", [i % 1000 for i in range(8_000)], []),
    "short messages": header("", [], ["a"] * 20_000),
}


@pytest.mark.parametrize("name", HEADERS)
def test_reading_a_header_takes_no_more_than_the_reserved_memory(name: str) -> None:
    data = json.dumps(HEADERS[name].to_dict()).encode()
    tracemalloc.start()
    try:
        values: dict[str, Any] = json.loads(bytes(bytearray(data)))
        read = ChatHeader.from_dict(Path("talk"), values)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read == HEADERS[name]
    assert peak_bytes <= JSON_COPIES * len(data)
