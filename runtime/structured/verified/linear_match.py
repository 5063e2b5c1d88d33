"""Whether a text matches a regular expression of a JSON schema, in time that is linear in the text."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from lowtide.models.errors import BadOption
from lowtide.runtime.structured.extent.schema_extent import schema_extent
from lowtide.runtime.structured.grammar.library import LIMITS, llguidance

END = 256
"""The id of the end token: the others are the 256 bytes."""


def matches(pattern: str, text: str) -> bool:
    """Whether the text has a match; raises `BadOption` for a pattern that no automaton can be made of."""
    matcher = _matcher(pattern).deep_copy()
    written = json.dumps(text, ensure_ascii=False).encode("utf-8", errors="replace")
    return bool(matcher.consume_tokens(list(written))) and bool(matcher.is_accepting())


@lru_cache(maxsize=64)
def _matcher(pattern: str) -> Any:
    library = llguidance()
    schema = {"type": "string", "pattern": pattern}
    schema_extent(schema).check()
    grammar = library.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    limits = library.LLParserLimits(**LIMITS)
    made = library.LLMatcher(_tokenizer(), grammar, log_level=0, limits=limits)
    if made.is_error():
        shown = pattern if len(pattern) <= 60 else pattern[:57] + "..."
        raise BadOption(
            f"the JSON schema cannot be verified: the pattern {shown!r} is no regular expression that can be run "
            "in linear time (look-around, back references); write it differently"
        )
    return made


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    library = llguidance()
    return library.LLTokenizer(library.TokenizerWrapper(_Bytes()), slices=[])


class _Bytes:
    """A vocabulary of the 256 bytes, as llguidance reads one."""

    eos_token_id = END
    bos_token_id = None
    special_token_ids = (END,)
    tokens = (*(bytes([i]) for i in range(256)), b"<end>")

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())
