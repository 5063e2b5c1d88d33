"""Conversation: messages to prompt tokens, so that a new turn costs only its new tokens.

Knows no model but its tokenizer and template. An answer that was generated goes back into the next
prompt as the very tokens that were sampled: written out and tokenised again they could be others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lowtide.models.chat_template import ChatTemplate, Message
from lowtide.models.errors import TemplateError
from lowtide.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A prompt as text and as tokens, and how many messages are in it."""

    text: str
    token_ids: Sequence[int]
    num_messages: int


@dataclass(slots=True)
class LastAnswer:
    """The last prompt of a chat with its answer, as text and as the tokens that it was read as."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_messages: int = 0

    def set(self, text: str, token_ids: list[int], num_messages: int) -> None:
        """Be another one; with an empty text the next prompt is tokenised whole."""
        self.text, self.token_ids, self.num_messages = text, token_ids, num_messages


class Conversation:
    """Writes prompts and keeps `last` up to date."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, last: LastAnswer) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._last = last

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt as text."""
        return self._template.render(messages)

    def prompt_ids(self, text: str, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of the rendered prompt `text`.

        Only the template may write control tokens: where a message spells one out, it is read as
        plain text.
        """
        last = self._last
        if last.text and text.startswith(last.text):
            rest = text[len(last.text) :]
            new_messages = messages[last.num_messages :]
            return [*last.token_ids, *self._encode(rest, new_messages, add_special=False)]
        begins_text = self._tokenizer.special_texts.get("bos_token") or None
        add_special = begins_text is None or not text.startswith(begins_text)
        return self._encode(text, messages, add_special=add_special)

    def answered(self, prompt: ChatPrompt, answer_ids: Sequence[int]) -> None:
        """Remember what followed the prompt, also where the answer was cut short."""
        answer = self._tokenizer.decode(answer_ids)
        if "\ufffd" in answer:  # half a character: its tokens do not spell the text that was shown
            self._last.set("", [], 0)
            return
        token_ids = [*prompt.token_ids, *answer_ids]
        self._last.set(prompt.text + answer, token_ids, prompt.num_messages + 1)

    def _encode(self, text: str, messages: Sequence[Message], *, add_special: bool) -> list[int]:
        forged = [m["content"] for m in messages if self._spells_control_tokens(m["content"])]
        token_ids: list[int] = []
        position = 0
        for content in forged:
            start, written = _find(text, content, position)
            if start > position:
                token_ids += self._tokenizer.encode(
                    text[position:start], add_special=add_special, parse_special=True
                )
                add_special = False
            token_ids += self._tokenizer.encode(written, add_special=False, parse_special=False)
            position = start + len(written)
        rest = self._tokenizer.encode(text[position:], add_special=add_special, parse_special=True)
        return token_ids + rest

    def _spells_control_tokens(self, content: str) -> bool:
        plain = self._tokenizer.encode(content, add_special=False, parse_special=False)
        return plain != self._tokenizer.encode(content, add_special=False, parse_special=True)


def _find(text: str, content: str, position: int) -> tuple[int, str]:
    """Return where `content` stands in the rendered text, as written or without its outer blanks."""
    for written in (content, content.strip()):
        start = text.find(written, position)
        if start >= 0:
            return start, written
    raise TemplateError(
        "a message spells out one of the model's control tokens and the chat template rewrites it: "
        "take the token out of the message"
    )
