"""Passkeys: a number hidden in a long text, and whether a policy still finds it.

A divergence averaged over a text does not show that one number is lost; this does (passkey retrieval of
Mohtashami and Jaggi 2023, a form of Kamradt's "needle in a haystack").
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowtide.attention.evaluation.divergence import read_prompt
from lowtide.attention.policy import PassController
from lowtide.models.chat_template import ChatTemplate
from lowtide.models.errors import TemplateError
from lowtide.models.model import Model
from lowtide.models.template.families import template_of
from lowtide.models.text.prompt_span import text_of
from lowtide.models.text.tokenizer import common_prefix

ANSWER_TOKENS = 10
OPENING = "Read this text.\n"
QUESTION = "\nWhat is the secret pass key mentioned in the text?"
ANSWER = "The secret pass key is"

Framing = Callable[[str], str]
"""Puts a user's message into the model's chat template, up to the beginning of the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passkey:
    """A prompt of `length` tokens with `key` hidden at `depth`, a share of the length.

    `answer_ids` are the tokens of the key behind the prompt.
    """

    key: str
    length: int
    depth: float
    token_ids: Sequence[int]
    answer_ids: Sequence[int]


def chat_framing(
    model: Model, arguments: Mapping[str, Any] | None = None, *, required: bool = False
) -> Framing:
    """Return the model's chat template, or the plain text if it has none that works.

    `arguments` are the template's. Where it is `required`, raises `TemplateError` for one that does not work.
    """
    source, _ = template_of(model.spec, model.tokenizer)
    try:
        template = ChatTemplate(source, model.tokenizer.special_texts)
        template.render([{"role": "user", "content": "x"}], arguments=arguments)
    except TemplateError:
        if required:
            raise
        return lambda text: text + "\n"
    return lambda text: text_of(
        template.render([{"role": "user", "content": text}], arguments=arguments)
    )


def make_passkey(seed: int, *, doubled: bool = False) -> str:
    """Return five digits; `doubled` makes two neighbours equal, which an approximation may merge."""
    random_digits = random.Random(seed)
    if not doubled:
        return str(random_digits.randint(10_000, 99_999))
    four = str(random_digits.randint(1000, 9999))
    at = random_digits.randrange(4)
    return four[:at] + four[at] + four[at:]


def hide_passkey(
    model: Model, haystack: Sequence[int], framing: Framing, length: int, depth: float, key: str
) -> Passkey:
    """Build a prompt of about `length` tokens; raises `ValueError` if the haystack is too short."""
    before, _, after = framing(OPENING + "\0" + QUESTION).partition("\0")
    start = model.tokenizer.encode(before, add_special=True, parse_special=True)
    end = model.tokenizer.encode(after + ANSWER, add_special=False, parse_special=True)
    answered = model.tokenizer.encode(
        f"{after}{ANSWER} {key}", add_special=False, parse_special=True
    )
    sentence = f"\nThe secret pass key is {key}. Remember it: {key} is the pass key.\n"
    passkey = model.tokenizer.encode(sentence, add_special=False, parse_special=False)
    room = length - len(start) - len(end) - len(passkey)
    if not 0 < room <= len(haystack):
        raise ValueError(f"the text has {len(haystack)} tokens; it must have {room}")
    at = int(room * depth)
    token_ids = [*start, *haystack[:at], *passkey, *haystack[at:room], *end]
    return Passkey(
        key=key,
        length=length,
        depth=depth,
        token_ids=token_ids,
        answer_ids=answered[common_prefix(end, answered) :],
    )


def finds(model: Model, controller: PassController, passkey: Passkey) -> bool:
    """Whether a policy finds the key: it reads the prompt and answers greedily.

    The cache must hold a beginning of the prompt, read densely, or nothing; see `read_prompt`.
    """
    return passkey.key in continued(model, controller, passkey.token_ids)


def continued(model: Model, controller: PassController, token_ids: Sequence[int]) -> str:
    """Return the greedy continuation of a prompt, of a few tokens; the cache as for `finds`."""
    token_id, answer = token_ids[-1], list[int]()
    with read_prompt(model, controller, token_ids[:-1]):
        for _ in range(ANSWER_TOKENS):
            controller.begin_decode()
            token_id = int(model.forward((token_id,)).argmax())
            answer.append(token_id)
    return model.tokenizer.decode(answer)
