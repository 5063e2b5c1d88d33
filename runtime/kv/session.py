"""KVSession: the KV cache of a model's one sequence, with the prefix cache and the prompt filter in front of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowtide.attention.policy import PassController
from lowtide.memory.plan.kv_reservation import KVReservation
from lowtide.memory.units import OverBudget
from lowtide.models.draft_tree import TokenTree
from lowtide.models.errors import SnapshotError
from lowtide.models.model import Model, SequenceSlice
from lowtide.models.text.tokenizer import common_prefix
from lowtide.runtime.kv.cache import CachedPrompt, DecodeStep, KVCache
from lowtide.runtime.kv.prefix_cache import CachedPrefix, PrefixCache
from lowtide.runtime.kv.prompt_filter import PromptFilter
from lowtide.runtime.profiling.profiler import DECODE, FILTER, PREFILL, SILENT, Profiler

if TYPE_CHECKING:
    from lowtide.models.model import Logits, Logits2D
    from lowtide.runtime.kv.cache import PassResult


class KVSession(KVCache):
    """Keeps a model's KV cache and the list of its tokens consistent, also after an interrupted pass.

    It has one sequence, number 0. `controller` prepares the attention kernels for each pass, `reservation` reserves the
    cache's bytes, `profiler` times the passes, `prefixes` stores what another prompt replaces, and `prompt_filter`
    shortens long prompts. `owner` is that of the tokens. Tokens from position `exact_until` on have keys and values
    that an approximate pass computed.
    """

    def __init__(
        self,
        model: Model,
        controller: PassController | None = None,
        reservation: KVReservation | None = None,
        profiler: Profiler = SILENT,
        prompt_filter: PromptFilter | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self._model = model
        self._controller = controller or PassController()
        self._reservation = reservation
        self._profiler = profiler
        self._filter = prompt_filter
        self._prefixes = prefixes or PrefixCache(0)
        self.token_ids: list[int] = []
        self.exact_until = 0
        self.owner = ""

    @property
    def batch_size(self) -> int:
        """Tokens that one forward pass takes."""
        return self._model.batch_size

    def reserve(self, num_tokens: int) -> None:
        """Reserve memory for `num_tokens` tokens in all; raises `OverBudget` where there is no room."""
        if self._reservation is not None:
            self._reservation.admit(num_tokens)

    def num_free(self, sequence: int = 0) -> int:
        """Return how many more tokens the context has room for."""
        return self._model.context - len(self.token_ids)

    def has_room(self, sequence: int = 0, num_tokens: int = 1) -> bool:
        """Return whether the memory budget allows so many more tokens, and reserve them."""
        try:
            self.reserve(len(self.token_ids) + num_tokens)
        except OverBudget:
            return False
        return True

    def add(
        self, sequence: int, token_ids: Sequence[int], max_tokens: int, owner: str = ""
    ) -> CachedPrompt:
        """Go to the longest cached prefix of a prompt, which is filtered before where the policy says so."""
        if owner != self.owner:
            self.evict()
            self.owner = owner
        retained = self._filtered(token_ids)
        is_restored = self.restore(retained)
        num_reused = self.truncate_to_prefix(retained)
        self.reserve(len(retained))
        return CachedPrompt(
            token_ids=retained,
            num_cached=num_reused,
            num_reused=num_reused,
            num_restored=num_reused if is_restored else 0,
        )

    def _filtered(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Return the tokens of a prompt that the filter retains; evict the cache if the filter needs its room."""
        if self._filter is None or not self._filter.applies_to(token_ids):
            return token_ids
        if not self._filter.caches_prompt:
            self.evict()
        self._controller.begin_prefill()  # the filter computes a prompt, whatever was decoded before
        with self._profiler.span(FILTER, len(token_ids)):
            retained = self._filter.filter(token_ids)
        self._profiler.filtered(self._filter.retention_map)
        return retained

    def truncate_to_prefix(self, token_ids: Sequence[int]) -> int:
        """Keep the longest common prefix with `token_ids` and return its length.

        At least the last token is left to compute, because its logits are needed. Also removes what an interrupted
        pass may have left in the cache.
        """
        common = common_prefix(self.token_ids, token_ids)
        with self._profiler.span("truncate"):
            num_left = self._model.truncate(max(min(common, len(token_ids) - 1), 0))
        del self.token_ids[num_left:]
        self.reserve(num_left)
        self.exact_until = min(self.exact_until, num_left)
        return num_left

    def restore(self, token_ids: Sequence[int]) -> bool:
        """Restore the prefix cache's best match for a prompt if it is longer than the session's own.

        Returns whether it did; `truncate_to_prefix` then removes what is not common. What the session holds and
        would lose is stored before.
        """
        if not self._prefixes.limit_bytes:
            return False
        self.sync()
        prompt = token_ids[:-1]  # the last token is computed in any case
        common = common_prefix(self.token_ids, prompt)
        found = self._prefixes.find(prompt, longer_than=common, owner=self.owner)
        self._store_prefix(num_staying=0 if found else common, keep=found)
        return found is not None and self._put_back(found)

    def _store_prefix(self, num_staying: int = 0, keep: CachedPrefix | None = None) -> None:
        if num_staying < len(self.token_ids):
            with self._profiler.span("prefix cache"):
                self._prefixes.store(
                    self._model,
                    self.token_ids,
                    self.exact_until,
                    num_staying=num_staying,
                    keep=keep,
                    owner=self.owner,
                )

    def _put_back(self, prefix: CachedPrefix) -> bool:
        """Restore a snapshot; where that fails the prompt is computed."""
        try:
            self.reserve(prefix.num_tokens)
        except OverBudget:
            return False
        self.token_ids, self.exact_until = [], 0
        try:
            with self._profiler.span("restore"):
                self._model.put_kv(prefix.snapshot, prefix.num_tokens)
        except SnapshotError:
            self._prefixes.discard(prefix)
            return False
        self.token_ids, self.exact_until = list(prefix.token_ids), prefix.exact_until
        return True

    def evict(self) -> None:
        """Store the cache in the prefix cache, then clear it."""
        self.sync()
        self._store_prefix()
        self.clear()

    def clear(self) -> None:
        """Remove all tokens and release their memory."""
        self._model.truncate(0)
        self.token_ids.clear()
        self.exact_until = 0
        self.reserve(0)

    def compute(
        self, chunks: Sequence[SequenceSlice], steps: Sequence[DecodeStep]
    ) -> list[PassResult]:
        """Append tokens of the prompt, or the last token and its drafts; see `KVCache.compute`.

        Drafts lie in the cache beyond the session's tokens until they are accepted, in slots that the plan has for
        them.
        """
        if chunks:
            (chunk,) = chunks
            return [self.append(chunk.token_ids)[None][: chunk.num_logits]]
        (step,) = steps
        if len(step.tree) == 1:
            return [self.decode_token(step.tree.token_ids[0])[None]]
        return [self._verify(step.tree)]

    def append(self, token_ids: Sequence[int]) -> Logits:
        """Compute tokens of a prompt exactly, at most `batch_size`; return the last one's logits, (vocabulary,).

        Raises `OverBudget`, before anything is computed, where the cache may not grow so far.
        """
        self.reserve(len(self.token_ids) + len(token_ids))
        self._controller.begin_prefill()
        was_exact = self.exact_until == len(self.token_ids)
        with self._profiler.span(PREFILL, len(token_ids)):
            logits = self._model.forward(token_ids)
        self.token_ids.extend(token_ids)
        if was_exact:
            self.exact_until = len(self.token_ids)
        return logits

    def decode_token(self, token_id: int) -> Logits:
        """Compute one token after the prompt; return its logits, shape (vocabulary,).

        When the policy's correction is due, the tokens since the last one are computed again, exactly
        (TidalDecode's KV cache correction).
        """
        self.reserve(len(self.token_ids) + 1)
        self._controller.begin_decode()
        with self._profiler.span(DECODE, 1):
            logits = self._model.forward((token_id,))
        self.token_ids.append(token_id)
        interval = self._controller.correction_interval
        if interval is not None and len(self.token_ids) - self.exact_until >= interval:
            return self._correct()
        return logits

    def _verify(self, tree: TokenTree) -> Logits2D:
        self.reserve(len(self.token_ids) + 1)
        self._controller.begin_decode()
        with self._profiler.span(DECODE, len(tree)):
            rows = self._model.forward_tree(tree)
        self.token_ids.append(tree.token_ids[0])
        return rows

    def accept(self, sequence: int, token_id: int, row: int) -> None:
        """Append a draft of the last step, which is in the cache already."""
        self._model.commit_branch(row)
        self.token_ids.append(token_id)

    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Remove the tokens from `num_tokens` on, rejected drafts included."""
        if self._model.num_tokens > num_tokens:
            self._truncate_model(num_tokens)

    def sync(self) -> int:
        """Remove what an interrupted pass may have left in the cache; return how many tokens there are."""
        return self._truncate_model(len(self.token_ids))

    def _truncate_model(self, num_tokens: int) -> int:
        num_left = self._model.truncate(num_tokens)
        del self.token_ids[num_left:]
        self.exact_until = min(self.exact_until, num_left)
        return len(self.token_ids)

    def save_kv(self, path: Path) -> int:
        """Write the KV cache, after `sync`, to a file and return its bytes."""
        return self._model.save_kv(path, self.token_ids)

    def load_kv(self, path: Path, num_bytes: int, num_tokens: int, exact_until: int) -> None:
        """Load a KV cache from the first bytes of a file; where that fails the session is empty."""
        self.token_ids, self.exact_until, self.owner = [], 0, ""
        self.token_ids = self._model.load_kv(path, num_bytes, num_tokens)
        self.exact_until = min(exact_until, len(self.token_ids))

    def _correct(self) -> Logits:
        again = self.token_ids[:]
        start = self.truncate_to_prefix(again[: self.exact_until + 1])
        for begin in range(start, len(again), self.batch_size):
            logits = self.append(again[begin : begin + self.batch_size])
        return logits
