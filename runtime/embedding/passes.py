"""EmbeddingPasses: tokenises texts and packs them into passes; the results come in the order of the texts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeAlias

from lowtide.memory.plan.estimates import prompt_limit_bytes
from lowtide.models.arguments.values import shown
from lowtide.models.errors import BadOption, ForwardError, LowtideWarning
from lowtide.models.gguf.embedding import GgufEmbedder
from lowtide.runtime.arguments import listed_values
from lowtide.runtime.errors import TextTooLong

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors: TypeAlias = NDArray[np.float32]

TRUNCATE = "truncate"


class EmbeddingPasses:
    """Runs texts through `model`, in passes of up to `batch_size` tokens; a longer text has a pass of its own.

    `alone` is entered around each use of the model.
    """

    def __init__(
        self,
        model: GgufEmbedder,
        alone: Callable[[], AbstractContextManager[object]],
        *,
        batch_size: int,
        overflow: str,
    ) -> None:
        self._model, self._alone = model, alone
        self._batch_size, self._overflow = batch_size, overflow

    @property
    def width(self) -> int:
        """The length of a vector."""
        return self._model.width

    def run(self, texts: Iterable[str], *, normalize: bool) -> Generator[Vectors, None, None]:
        """Yield the vectors of each text, in order; fp32, shape [1 or number of tokens, width]."""
        packed: list[list[int]] = []
        num_tokens = 0
        for number, text in enumerate(texts, 1):
            token_ids = self._tokens(number, text)
            is_full = len(packed) == self._model.max_sequences
            if packed and (is_full or num_tokens + len(token_ids) > self._batch_size):
                yield from self._computed(packed, normalize)
                packed, num_tokens = [], 0
            packed.append(token_ids)
            num_tokens += len(token_ids)
        if packed:
            yield from self._computed(packed, normalize)

    def _computed(self, packed: Sequence[Sequence[int]], normalize: bool) -> list[Vectors]:
        import numpy as np

        with self._alone():
            computed = self._model.embed(packed)
        if not all(np.isfinite(vectors).all() for vectors in computed):
            raise ForwardError(
                f"the model's embeddings are not numbers: {self._model.name} is damaged, or its weights overflow"
            )
        return [normalized(vectors) for vectors in computed] if normalize else computed

    def _tokens(self, number: int, text: str) -> list[int]:
        """Return the tokens of a text; cut them, or raise `TextTooLong`, where they are too many."""
        most, most_bytes = self._model.max_tokens, prompt_limit_bytes(self._model.max_tokens)
        is_long = len(text.encode("utf-8", errors="replace")) > most_bytes
        if is_long:
            if self._overflow != TRUNCATE:
                raise TextTooLong(number, f"more than {most_bytes:,} bytes", most)
            text = text.encode("utf-8", errors="replace")[:most_bytes].decode(errors="ignore")
        with self._alone():
            token_ids = self._model.tokenizer.encode(text, add_special=True, parse_special=False)
        if not token_ids:
            raise BadOption(
                f"text {number} is empty, and {self._model.name} adds no token to a text: leave the text out"
            )
        if len(token_ids) <= most and not is_long:
            return token_ids
        if self._overflow != TRUNCATE:
            raise TextTooLong(number, f"{len(token_ids):,} tokens", most)
        size = f"more than {most_bytes:,} bytes" if is_long else f"{len(token_ids):,} tokens"
        warnings.warn(
            f"text {number} has {size}; its first {most:,} tokens are embedded",
            LowtideWarning,
            stacklevel=2,
        )
        return self._cut(token_ids, most)

    def _cut(self, token_ids: list[int], most: int) -> list[int]:
        """Return the first tokens, and what the vocabulary puts behind a text."""
        if len(token_ids) <= most:
            return token_ids
        behind = self._behind
        return token_ids[: most - len(behind)] + behind if len(behind) < most else token_ids[:most]

    @property
    def _behind(self) -> list[int]:
        """The tokens that the vocabulary adds behind every text, such as [SEP]."""
        encode = self._model.tokenizer.encode
        plain = encode("a", add_special=False, parse_special=False)
        whole = encode("a", add_special=True, parse_special=False)
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[start + len(plain) :]
        return []


def normalized(vectors: Vectors) -> Vectors:
    """Return the vectors with length 1; one of length 0 stays as it is."""
    import numpy as np

    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    scaled: Vectors = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return scaled


def checked_texts(texts: str | Sequence[str]) -> list[str]:
    """Return the texts as a list; raise `BadOption` for what is no text."""
    listed = [texts] if isinstance(texts, str) else listed_values("texts", texts, "texts")
    for number, text in enumerate(listed, 1):
        if not isinstance(text, str):
            raise BadOption(f"text {number} is {shown(text)}; each text must be a string")
    return listed
