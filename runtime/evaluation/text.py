"""A long text to measure on: the user's, or the language reference that comes with Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowtide.memory.plan.estimates import prompt_limit_bytes
from lowtide.models.errors import BadOption
from lowtide.models.tokenizer import Tokenizer

BUILT_IN = "Python's own language reference"


def read_sample(path: Path | None, context: int) -> str:
    """Return as much of the text as a context's plan allows to be tokenised.

    Raises `BadOption` where the file cannot be read.
    """
    limit = prompt_limit_bytes(context)
    if path is None:
        return _built_in()[:limit]
    try:
        with path.open("rb") as file:
            return file.read(limit).decode("utf-8", errors="ignore")
    except OSError as error:
        raise BadOption(f"{path} cannot be read: {error.strerror or error}") from None


def sample_tokens(tokenizer: Tokenizer, text: str, wanted: int, *, whose: str) -> Sequence[int]:
    """Return the text's first `wanted` tokens; raises `BadOption` where it has fewer."""
    token_ids = tokenizer.encode(text, add_special=True, parse_special=False)
    if len(token_ids) < wanted:
        raise BadOption(
            f"{whose} has {len(token_ids):,} tokens, {wanted:,} are wanted: give a longer --text, or a "
            "smaller --context"
        )
    return token_ids[:wanted]


def _built_in() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise BadOption(
            "this Python comes without its language reference: give a text of your own with --text"
        ) from None
    return "\n".join(topics[name] for name in sorted(topics))
