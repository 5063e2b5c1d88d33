"""PromptSpan: a piece of a prompt, and whether a message or the chat template wrote it.

What a message says is text, always: control tokens come from the template's spans alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """A piece of a prompt. A prompt is the concatenation of its spans.

    `from_message` is True for text that a message (its content, tool calls, a role of its own, or a tool's description)
    brought in, also after a template's filter changed it. Such text never becomes a control token.
    """

    text: str
    from_message: bool


def text_of(spans: Iterable[PromptSpan]) -> str:
    """Return the whole text of a prompt."""
    return "".join(span.text for span in spans)


def span_lengths(spans: Iterable[PromptSpan]) -> list[int]:
    """Return the lengths of the spans in characters, by turns the template's and a message's."""
    lengths, from_message = [0], False
    for span in spans:
        if span.text and span.from_message != from_message:
            lengths.append(0)
            from_message = span.from_message
        lengths[-1] += len(span.text)
    return lengths


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
