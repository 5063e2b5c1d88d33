"""EmbeddingConfig: how to embed and how much memory it may take, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from lowtide.memory.machine import usable_cores
from lowtide.memory.plan.embedding import EmbeddingRequest
from lowtide.memory.units import checked_size
from lowtide.models.arguments.names import option
from lowtide.models.arguments.values import MOST, flag, shown, whole_number
from lowtide.models.errors import BadOption, UnsupportedModel
from lowtide.models.gguf.header.kind import POOLINGS
from lowtide.models.spec import ModelSpec

DEFAULT_POOLING = "mean"
RANK = "rank"
MAX_THREADS = 512
OVERFLOWS = ("error", "truncate")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingConfig:
    """How to embed.

    `memory` is a size ("1GiB", "50%"), `context` the length of the longest text in tokens, `batch_size` the tokens
    up to which texts are computed in one pass. `pooling` makes one vector of those of all tokens: "mean", "cls" (the
    first one), "last", or "none" (a vector for each token); None is what the header says, and mean where it says
    nothing. `overflow` says what happens to a text that is longer: "error", or "truncate".

    Raises `BadOption` or `BadSize` for values that cannot be.
    """

    memory: str | int | None = None
    context: int | None = None
    batch_size: int | None = None
    threads: int | None = None
    pooling: str | None = None
    overflow: str = "error"
    offline: bool = False

    def __post_init__(self) -> None:
        for name, most in (("context", MOST), ("batch_size", 4096), ("threads", MAX_THREADS)):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, whole_number(option(name), value, 1, most))
        if self.memory is not None:
            object.__setattr__(self, "memory", checked_size(option("memory"), self.memory))
        object.__setattr__(self, "offline", flag(option("offline"), self.offline))
        poolings = tuple(name for name in POOLINGS if name != RANK)
        if self.pooling is not None and self.pooling not in poolings:
            raise BadOption(
                f"{option('pooling')} is {shown(self.pooling)}; it must be one of {', '.join(poolings)}"
            )
        if self.overflow not in OVERFLOWS:
            raise BadOption(
                f"{option('overflow')} is {shown(self.overflow)}; it must be one of {', '.join(OVERFLOWS)}"
            )

    @classmethod
    def of(cls, **options: Any) -> EmbeddingConfig:
        """Return the config with these fields; raise `BadOption` for a name that is not one of them."""
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(names))
        if unknown:
            raise BadOption(
                f"unknown option {shown(unknown[0])}; the options are {', '.join(names)}"
            )
        return cls(**options)

    @property
    def num_threads(self) -> int:
        """The number of threads to compute with."""
        return self.threads or usable_cores()

    @property
    def request(self) -> EmbeddingRequest:
        """What the memory plan needs to know of these options."""
        return EmbeddingRequest(context=self.context, batch_size=self.batch_size)


def require_pooled(pooling: str | None) -> None:
    """Raise `BadOption` for "none", which gives a text more than one vector."""
    if pooling == "none":
        raise BadOption(
            f"{option('pooling', 'none')} gives a vector for each token: call embed_tokens of an Embedder"
        )


def pooling_of(spec: ModelSpec, asked: str | None) -> str:
    """Return how to pool: as asked, as the header says, or the mean.

    Raises `UnsupportedModel` for a model that ranks, which scores a pair of texts and embeds none.
    """
    if asked is not None:
        return asked
    if spec.pooling == RANK:
        raise UnsupportedModel(
            f"{spec.name} is a reranker, which scores pairs of texts: pick an embedding model, or name another "
            f"{option('pooling')} to see its vectors all the same"
        )
    return DEFAULT_POOLING if spec.pooling in (None, "none") else str(spec.pooling)
