"""PromptSpan: a piece of a prompt, and whether a message or the chat template wrote it.

What a message says is text, always: control tokens come from the template's spans alone.
"""

from __future__ import annotations

from collections.abc import Iterable
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
