"""PromptSpan: a piece of a prompt, and whether a message or the chat template wrote it.

What a message says is text, always: control tokens come from the template's spans alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """A piece of a prompt. A prompt is the concatenation of its spans.

    `from_message` is True for text that a message (its content, role, tool calls, or a tool's description) brought
    in, also after a template's filter changed it. Such text never becomes a control token.
    """

    text: str
    from_message: bool


def text_of(spans: Iterable[PromptSpan]) -> str:
    """Return the whole text of a prompt."""
    return "".join(span.text for span in spans)


def split_spans(
    spans: Sequence[PromptSpan], num_characters: int
) -> tuple[list[PromptSpan], list[PromptSpan]]:
    """Return the first `num_characters` of a prompt, and the rest of it."""
    before: list[PromptSpan] = []
    behind: list[PromptSpan] = []
    for span in spans:
        num_before = min(max(num_characters, 0), len(span.text))
        num_characters -= len(span.text)
        if num_before == len(span.text):
            before.append(span)
            continue
        if num_before:
            before.append(PromptSpan(span.text[:num_before], span.from_message))
        behind.append(PromptSpan(span.text[num_before:], span.from_message))
    return before, behind
