"""Checks what callers pass to the methods of `Runtime`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lowtide.models.arguments.values import shown, text
from lowtide.models.chat_template import Message
from lowtide.models.errors import BadOption


def checked_messages(messages: Any) -> list[Message]:
    """Return the messages of a chat as a list; a text alone is one question, and a dict alone one message.

    What is inside a message is for the chat template to check. Raises `BadOption` for anything else.
    """
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if isinstance(messages, Mapping):
        return [messages]
    found = listed_values("messages", messages, 'dicts with "role" and "content"')
    for message in found:
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(message, Mapping) or not isinstance(role, str | None):
            raise BadOption(
                f'messages has {shown(message)}; each of them must be a dict with "role" and "content"'
            )
    if not found:
        raise BadOption("messages is empty; it must have at least one message")
    return found


def checked_prompt(prompt: Any) -> str:
    """Return the prompt; raise `BadOption` where it is not a text."""
    return text("prompt", prompt)


def checked_prompts(prompts: Any) -> list[str]:
    """Return the prompts of a batch as a list; raise `BadOption` where it is not a list of texts."""
    if isinstance(prompts, str):
        raise BadOption("prompts is a single text; pass a list: [prompt]")
    found = listed_values("prompts", prompts, "texts")
    if not all(isinstance(prompt, str) for prompt in found):
        raise BadOption("prompts has an item that is not a text; pass a list of texts")
    return found


def listed_values(name: str, value: Any, what: str) -> list[Any]:
    """Return the values of any iterable as a list; raise `BadOption` for what is none, or a text in bytes."""
    is_listable = isinstance(value, Iterable) and not isinstance(value, bytes | bytearray | Mapping)
    try:
        return list(value) if is_listable else _refuse(name, value, what)
    except BadOption:
        raise
    except Exception as error:  # a caller's own iterator
        raise BadOption(
            f"{name} cannot be read ({error!r}); it must be a list of {what}"
        ) from error


def _refuse(name: str, value: Any, what: str) -> list[Any]:
    raise BadOption(f"{name} is {shown(value)}; it must be a list of {what}")


def checked_all(params: Any, num_prompts: int) -> Sequence[Any] | None:
    """Return the parameters of each prompt where a list was passed; None for parameters of all prompts."""
    if params is None or isinstance(params, Mapping) or not isinstance(params, Iterable):
        return None
    found = listed_values("params", params, "SamplingParams")
    if len(found) != num_prompts:
        raise BadOption(
            f"there are {len(found)} parameter sets for {num_prompts} prompts; pass one for each prompt, or one "
            "for all"
        )
    return found
