from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from lowtide.memory.plan.estimates import JSON_COPIES
from lowtide.runtime.generation.chat import LastTurn
from lowtide.runtime.sessions.file import SessionHead, Transcript


def head(text: str, token_ids: list[int], messages: list[str]) -> SessionHead:
    return SessionHead(
        component={"model": "m"},
        num_tokens=len(token_ids),
        exact_until=1,
        last=LastTurn(text, token_ids, len(messages)),
        transcript=Transcript(
            model="m", messages=tuple({"role": "user", "content": m} for m in messages)
        ),
    )


HEADS = {
    "text": head("word " * 20_000, [], ["word " * 20_000]),
    "wide text": head("привет " * 20_000, [], ["a" * 100_000 + "😀" * 20_000]),
    "tokens": head("", [i * 7919 % 49152 for i in range(8_000)], []),
    "small tokens": head("", [i % 1000 for i in range(8_000)], []),
    "short messages": head("", [], ["a"] * 20_000),
}


@pytest.mark.parametrize("name", HEADS)
def test_there_and_back_in_no_more_than_the_memory_that_is_reserved(name: str) -> None:
    data = json.dumps(HEADS[name].to_dict()).encode()
    tracemalloc.start()
    try:
        values: dict[str, Any] = json.loads(bytes(bytearray(data)))
        read = SessionHead.from_dict(Path("talk"), values)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read == HEADS[name]
    assert peak_bytes <= JSON_COPIES * len(data)
