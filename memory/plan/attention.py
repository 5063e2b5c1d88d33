"""What an attention policy adds to a memory plan: all that the planner knows about policies.

Every policy describes its memory with an `AttentionMemory`, or a subclass of it that lives beside the
policy. The planner asks it for bytes and knows nothing else about the policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowtide.models.spec import ModelSpec

ANSWER_TOKENS = 1024
"""Tokens that fit into the KV cache behind a filtered prompt."""


def retained_tokens(k: int | float, num_tokens: int) -> int:
    """Return how many tokens `k` is: a count, or below 1 a share of `num_tokens`, rounded up."""
    return int(k) if k >= 1 else math.ceil(k * num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterPrefill:
    """A prefill through the first layers only, which selects the tokens that all layers read.

    The first `num_layers` layers read the whole prompt in a second context; `k` of its tokens (below 1: a
    share of them) are then read by every layer. Prompts of up to `min_tokens` tokens are not filtered.
    """

    num_layers: int
    k: int | float
    min_tokens: int

    def cache_tokens(self, num_tokens: int) -> int:
        """Return the size in tokens of the KV cache of all layers, for prompts of `num_tokens`."""
        retained = max(retained_tokens(self.k, num_tokens), self.min_tokens)
        return min(retained + ANSWER_TOKENS, num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMemory:
    """The memory of a policy beyond the KV cache and the scratch of dense attention: here, none.

    `filter_prefill` is set by policies that shorten prompts before all layers read them.
    """

    filter_prefill: FilterPrefill | None = None

    @property
    def description(self) -> str:
        """What the bytes hold, for the plan's table; empty if there are none."""
        return ""

    def scratch_bytes(self, spec: ModelSpec, context: int, threads: int) -> int:
        """Return the upper bound in bytes for `context` tokens and `threads` kernel threads.

        It comes on top of `estimates.attention_bytes`, the scratch of dense attention.
        """
        return 0


NO_ATTENTION_MEMORY = AttentionMemory()
