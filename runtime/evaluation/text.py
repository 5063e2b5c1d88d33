"""The text that is measured on (the user's, or Python's language reference), and at which depths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowtide.attention.evaluation.divergence import WINDOW_TOKENS
from lowtide.attention.evaluation.passkeys import Framing, chat_framing
from lowtide.memory.plan.estimates import prompt_limit_bytes
from lowtide.models.arguments.names import option
from lowtide.models.arguments.paths import shown_path
from lowtide.models.arguments.text_files import decoded
from lowtide.models.errors import BadOption
from lowtide.models.text.prompt_span import PromptSpan
from lowtide.models.text.tokenizer import Tokenizer
from lowtide.runtime.loading.load import Engine

BUILT_IN = "Python's own language reference"
DEFAULT_CONTEXT = 4096
"""The depth in tokens up to which a policy is measured if the user sets none."""
MIN_CONTEXT = 256
SPARE_TOKENS = WINDOW_TOKENS + 1
"""How many tokens the text and the context must have beyond the measured depth."""

Progress = Callable[[str], None]


def read_sample(path: Path | None, context: int) -> str:
    """Return as much of the text as the plan for `context` tokens allows to tokenise.

    Raises `BadOption` if the file cannot be read.
    """
    limit = prompt_limit_bytes(context)
    if path is None:
        return _built_in().encode()[:limit].decode(errors="ignore")
    try:
        with path.open("rb") as file:
            data = file.read(limit)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadOption(f"cannot read {shown_path(path)}: {reason}") from None
    return decoded(data, shown_path(path), is_cut=len(data) == limit)


def sample_tokens(
    tokenizer: Tokenizer, text: str, num_tokens: int, *, source: str
) -> Sequence[int]:
    """Return the first `num_tokens` tokens of the text; raises `BadOption` if it has fewer.

    `source` names the text in the error.
    """
    spans = [PromptSpan(text, from_message=True)]
    token_ids = tokenizer.encode_spans(spans, add_special=True)
    if len(token_ids) < num_tokens:
        raise BadOption(
            f"{source} has {len(token_ids):,} tokens, but {num_tokens:,} are needed: use a longer "
            f"{option('text')} or a smaller {option('context')}"
        )
    return token_ids[:num_tokens]


def framing_of(engine: Engine, arguments: Mapping[str, Any] | None) -> Framing:
    """Return the chat template that questions are asked with; one that the user stated must work."""
    stated = engine.planned.options.chat_template is not None
    return chat_framing(engine.model, arguments, required=stated or bool(arguments))


def measured_depths(context: int, windows: int) -> list[int]:
    """Return up to `windows` ascending depths, from three quarters of `context` to all of it."""
    start = context * 3 // 4
    steps = max(windows - 1, 1)
    return sorted({context - (context - start) * step // steps for step in range(windows)})


def _built_in() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise BadOption(
            "this Python was installed without its language reference: use a text of your own with "
            f"{option('text')}"
        ) from None
    return "\n".join(topics[name] for name in sorted(topics))
