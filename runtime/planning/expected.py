"""ExpectedPrompt: a prompt that is held before the model is planned, so that the plan makes room for it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lowtide.memory.budget import Budget
from lowtide.memory.machine import read_machine
from lowtide.memory.plan.estimates import MIN_PROMPT_BYTES, prompt_limit_bytes
from lowtide.memory.units import OverBudget
from lowtide.models.arguments.names import option
from lowtide.models.chat_template import Message
from lowtide.models.errors import LowtideError
from lowtide.models.spec import ModelSpec
from lowtide.models.text.tokenizer import Tokenizer
from lowtide.runtime.backends.config import LoadConfig
from lowtide.runtime.errors import PromptTooLong
from lowtide.runtime.generation.chat import PromptEncoder
from lowtide.runtime.generation.turns import LastTurn
from lowtide.runtime.options import SamplingParams

ANY_CONTEXT = 1 << 40
"""No prompt is too long to be counted."""
UNLIMITED_ANSWER_TOKENS = 512
"""Expected of an answer without a limit."""
BYTES_PER_TOKEN = 3
"""Of a text whose tokens cannot be counted: natural text has about four."""
TEMPLATE_TOKENS = 64
TEXT_BYTES_PER_TOKEN = 4
"""Of natural text, for the number in an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedPrompt:
    """A text to continue, or the messages of a chat, with the options of the answer."""

    params: SamplingParams
    text: str = ""
    messages: Sequence[Message] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the chat template."""

    @property
    def is_chat(self) -> bool:
        """Whether it has messages, which the chat template renders."""
        return bool(self.messages)

    @property
    def num_bytes(self) -> int:
        """The bytes of its texts in UTF-8."""
        texts = [self.text, *(str(message.get("content", "")) for message in self.messages)]
        return sum(len(text.encode("utf-8", errors="replace")) for text in texts)

    @property
    def is_question(self) -> bool:
        """Whether it is a chat's question, and no text to continue."""
        return bool(self.messages)

    @property
    def answer_tokens(self) -> int:
        """The tokens that its answer may have."""
        most = self.params.max_tokens
        return UNLIMITED_ANSWER_TOKENS if most is None else most

    def count(self, tokenizer: Tokenizer | None, template: str | None) -> int:
        """Return the tokens of the prompt with its answer; an estimate without a tokenizer.

        A prompt that cannot be encoded is estimated, too: answering it says why.
        """
        answer_tokens = self.answer_tokens
        if tokenizer is not None:
            try:
                return self._num_tokens(tokenizer, template) + answer_tokens
            except LowtideError:
                pass
        return self.num_bytes // BYTES_PER_TOKEN + TEMPLATE_TOKENS + answer_tokens

    def _num_tokens(self, tokenizer: Tokenizer, template: str | None) -> int:
        encoder = PromptEncoder(tokenizer, template, LastTurn())
        params, now = replace(self.params, overflow="error"), time.perf_counter()
        if self.messages:
            request, _ = encoder.encode_chat(
                self.messages, ANY_CONTEXT, params, now, arguments=self.arguments
            )
        else:
            request = encoder.encode_text(self.text, ANY_CONTEXT, params, now)
        return len(request.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLimit:
    """The longest text, in bytes, that any plan within the budget can hold and tokenise."""

    num_bytes: int
    context: int
    longest_context: int
    budget_bytes: int
    tokenising_bytes: int

    @classmethod
    def of(cls, spec: ModelSpec, config: LoadConfig) -> PromptLimit:
        """Return the limit of a model and a request, before anything is planned."""
        budget = Budget.from_user(config.memory, read_machine())
        context = min(config.context or spec.context_length, spec.context_length)
        most = max(budget.num_bytes // spec.tokenising_bytes, MIN_PROMPT_BYTES)
        return cls(
            num_bytes=min(prompt_limit_bytes(context), most),
            context=context,
            longest_context=spec.context_length,
            budget_bytes=budget.num_bytes,
            tokenising_bytes=spec.tokenising_bytes,
        )

    def refusal(self, num_bytes: int, *, is_whole: bool) -> LowtideError:
        """Return the error for a text of `num_bytes` bytes, or of more where not all of it was read."""
        if self.num_bytes < prompt_limit_bytes(self.context):
            more = "" if is_whole else "more than "
            return OverBudget(
                f"tokenising a prompt of {more}{num_bytes:,} bytes",
                num_bytes * self.tokenising_bytes,
                self.budget_bytes,
                f"shorten the prompt, or raise {option('memory')}",
            )
        return PromptTooLong(
            num_bytes // TEXT_BYTES_PER_TOKEN,
            self.context,
            estimated=True,
            at_least=not is_whole,
            droppable=False,
            longest=self.longest_context,
        )
