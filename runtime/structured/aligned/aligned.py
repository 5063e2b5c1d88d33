"""Aligned: answers distributed as the model's among those that follow a constraint (ASAp).

Masking alone makes texts likely that begin well and can hardly end: a token gets the probability of what is legal next,
not of what can be completed. Grammar-aligned decoding with approximate expected futures (Park et al. 2024,
arXiv 2405.21047) remembers, in a trie of the prefixes that were sampled, how much probability turned out to be illegal
behind each token, and weighs tokens by the rest. The first answer is that of masking; each further answer of the same
prompt and constraint is closer to the model's distribution.

Particles (AWRS) draw with these rates, too, and their weights are corrected for it (twisted proposals). The rates may
be anything without changing what the particles stand for; fewer of them come to nothing the better the rates are.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lowtide.runtime.structured.constraint import Constraint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lowtide.models.model import Logits
    from lowtide.runtime.structured.constraint import TokenIds

MAX_NODES = 16_384
"""Prefixes that are remembered of all prompts and constraints together; then the tries that were used first go."""
NODE_BYTES = 450
TRIES_BYTES = MAX_NODES * NODE_BYTES
LEAST_RATE = 1e-9
"""A token whose known continuations are all illegal stays possible: others may be legal."""


class Node:
    """A prefix: `rate` is an upper bound of the probability that the model goes on to a legal answer from it."""

    __slots__ = ("chance", "children", "is_visited", "parent", "rate")

    def __init__(self, parent: Node | None = None, chance: float = 1.0) -> None:
        self.parent, self.chance = parent, chance
        self.rate = 1.0
        self.is_visited = False
        self.children: dict[int, Node] = {}

    def lower(self, amount: float) -> None:
        """Lower the rate, and those of the prefixes before it by what that changes for them."""
        node: Node | None = self
        while node is not None and amount > 0:
            node.rate = max(node.rate - amount, 0.0)
            amount *= node.chance
            node = node.parent


class Tries:
    """The tries of a model's prompts and constraints, `MAX_NODES` prefixes in all."""

    def __init__(self) -> None:
        self._roots: dict[Hashable, Node] = {}
        self._num_nodes: dict[Hashable, int] = {}

    def root(self, key: Hashable) -> Node:
        """Return the trie of a key, which is the last to go now."""
        root = self._roots.pop(key, None) or Node()
        self._roots[key] = root
        self._num_nodes.setdefault(key, 1)
        return root

    def add(self, key: Hashable, node: Node, token_id: int, chance: float) -> Node | None:
        """Return the child of a node; None where there is no room for a new one."""
        child = node.children.get(token_id)
        if child is not None or key not in self._roots:
            return child
        while sum(self._num_nodes.values()) >= MAX_NODES:
            oldest = next(iter(self._roots))
            if oldest == key:
                return None
            del self._roots[oldest], self._num_nodes[oldest]
        self._num_nodes[key] += 1
        child = node.children[token_id] = Node(node, chance)
        return child

    def clear(self) -> None:
        """Forget everything."""
        self._roots.clear()
        self._num_nodes.clear()


def held_bytes(num_bytes: int, sampling: str) -> int:
    """Return what a constraint of `num_bytes` holds with the tries that a way of sampling needs."""
    return num_bytes + (0 if sampling == "masked" else TRIES_BYTES)


def _floored(node: Node) -> float:
    return max(node.rate, LEAST_RATE)


class Aligned(Constraint):
    """The rules of `inner`, with the tries' weights at a temperature; `key` stands for the constraint."""

    def __init__(
        self,
        inner: Constraint,
        tries: Tries,
        key: Hashable,
        end_ids: Sequence[int],
        temperature: float,
        *,
        asks_mask: bool = True,
    ) -> None:
        self._inner = inner.fork()
        self._tries, self._key = tries, key
        self._end_ids, self._temperature = tuple(end_ids), temperature
        self._node: Node | None = None
        self._logits: Logits | None = None
        self._log_sum = self._log_offset = 0.0
        self._asks_mask = asks_mask
        self._rate_when_chosen = 1.0

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Take the trie of the prompt."""
        self._inner.begin(prompt_ids)
        self._key = (self._key, hash(tuple(prompt_ids)))
        self._node = self._tries.root(self._key)

    def fork(self) -> Aligned:
        """Return an independent copy, which shares the tries."""
        copy = self.__class__.__new__(self.__class__)
        copy.__dict__.update(self.__dict__)
        copy._inner = self._inner.fork()
        return copy

    def weigh(self, logits: Logits) -> Logits:
        """Return the logits with the share of each token's continuations that may be legal."""
        import numpy as np

        logits = self._inner.weigh(logits)
        largest = float(logits.max())
        scaled = np.exp((logits.astype(np.float64) - largest) / self._temperature)
        self._logits, self._log_sum = (
            logits,
            math.log(float(scaled.sum())) * self._temperature + largest,
        )
        self._log_offset = -math.log(self._rate_when_chosen)
        if self._node is None:
            return logits
        if self._asks_mask and not self._node.is_visited:
            self._node.is_visited = True
            legal = self._inner.legal_ids()
            legal_sum = float(scaled[legal[legal < len(logits)]].sum())
            if self._inner.is_accepting:
                legal_sum += float(scaled[list(self._end_ids)].sum())
            self._node.lower(1.0 - min(legal_sum / float(scaled.sum()), 1.0))
        if not self._node.children:
            return logits
        lost = sum(child.chance * (1 - _floored(child)) for child in self._node.children.values())
        self._log_offset += math.log(max(1 - lost, LEAST_RATE))
        weighed = logits.copy()
        for token_id, child in self._node.children.items():
            weighed[token_id] += self._temperature * math.log(_floored(child))
        return weighed

    def advance(self, token_id: int) -> None:
        """Append a token that is allowed; one that the model chose is remembered."""
        self._inner.advance(token_id)
        node, self._node = self._node, None
        if node is not None and self._logits is not None:
            logit = float(self._logits[token_id])
            chance = math.exp((logit - self._log_sum) / self._temperature)
            known = node.children.get(token_id)
            self._rate_when_chosen = 1.0 if known is None else _floored(known)
            self._node = self._tries.add(self._key, node, token_id, chance)
        self._logits = None

    def note_illegal(self, token_id: int) -> None:
        """Remember a token that was drawn and may not come."""
        if self._node is not None and self._logits is not None and not self._node.is_visited:
            chance = math.exp((float(self._logits[token_id]) - self._log_sum) / self._temperature)
            child = self._tries.add(self._key, self._node, token_id, chance)
            if child is not None:
                child.lower(child.rate)

    def note_cut(self) -> None:
        """Remember that the model did not complete the answer in time: that is no legal answer of its own."""
        if self._node is not None:
            self._node.lower(self._node.rate)

    @property
    def log_offset(self) -> float:
        """The logarithm of the factor by which the rates changed the weight of the token that is chosen now."""
        return self._log_offset

    def retry(self) -> Aligned | None:
        """Return another attempt where the answer is wrong: it had no part in the rate then."""
        again = self._inner.retry()
        if again is None:
            return None
        if self._node is not None:
            self._node.lower(self._node.rate)
        copy = self.fork()
        copy._inner, copy._node, copy._logits = again, self._tries.root(self._key), None
        copy._rate_when_chosen = 1.0
        return copy

    def allows(self, token_id: int) -> bool:
        """Whether the token may come next."""
        return self._inner.allows(token_id)

    def num_legal(self, token_ids: Sequence[int]) -> int:
        """Return how many of the tokens may come one after the other."""
        return self._inner.num_legal(token_ids)

    def legal_ids(self) -> TokenIds:
        """Return all tokens that may come next."""
        return self._inner.legal_ids()

    def legal_among(self, token_ids: TokenIds) -> NDArray[np.bool_]:
        """Return which of the tokens may come next."""
        return self._inner.legal_among(token_ids)

    @property
    def is_accepting(self) -> bool:
        """Whether the answer may end here."""
        return self._inner.is_accepting

    @property
    def is_done(self) -> bool:
        """Whether nothing may follow."""
        return self._inner.is_done

    @property
    def may_strand(self) -> bool:
        """Whether legal tokens may lead where no end can be reached."""
        return self._inner.may_strand

    def forced(self) -> Sequence[int]:
        """Return the tokens of the text that must come next."""
        return self._inner.forced()

    @property
    def needs_logits(self) -> bool:
        """The tries have the probability of every token."""
        return True

    def why_longer(self, max_tokens: int) -> str | None:
        """Return what makes every answer longer than so many tokens."""
        return self._inner.why_longer(max_tokens)

    def closing(self, max_tokens: int) -> Sequence[int] | None:
        """Return tokens that bring the answer to an end."""
        return self._inner.closing(max_tokens)

    def near_closing(self, max_tokens: int) -> Sequence[int] | None:
        """Return tokens that bring the answer to an end where they are found soon."""
        return self._inner.near_closing(max_tokens)

    def checked_closing(self, closing: Sequence[int], max_tokens: int) -> Sequence[int]:
        """Return `closing`, or a better one."""
        return self._inner.checked_closing(closing, max_tokens)

    def ends(self, token_ids: Sequence[int]) -> bool:
        """Whether the tokens bring the answer to an end."""
        return self._inner.ends(token_ids)

    def closing_after(
        self, closing: Sequence[int], token_id: int, max_tokens: int
    ) -> Sequence[int] | None:
        """Return a way to the end behind `token_id`, where `closing` was one before it."""
        return self._inner.closing_after(closing, token_id, max_tokens)

    def rests(self, closing: Sequence[int], token_id: int) -> Iterable[Sequence[int]]:
        """Yield ways that may still lead to the end."""
        return self._inner.rests(closing, token_id)

    def likely_next(self) -> Iterable[Sequence[int]]:
        """Yield tokens that tend to lead to the end."""
        return self._inner.likely_next()

    @property
    def num_attempts(self) -> int:
        """How many attempts were made at the answer, with this one."""
        return self._inner.num_attempts

    @property
    def enforced(self) -> str:
        """How the rules hold."""
        return self._inner.enforced

    def report(self) -> dict[str, Any]:
        """Return what the rules report."""
        return self._inner.report()
