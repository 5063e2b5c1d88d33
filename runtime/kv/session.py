"""Session: the tokens that are in a model's KV cache. Knows no text and no sampling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowtide.attention.policy import PassController
from lowtide.memory.plan.kv_reservation import KVReservation
from lowtide.memory.units import OverBudget
from lowtide.models.draft_tree import TokenTree
from lowtide.models.errors import SnapshotError
from lowtide.models.model import Model
from lowtide.models.tokenizer import common_prefix
from lowtide.runtime.kv.prefix_cache import CachedPrefix, PrefixCache
from lowtide.runtime.kv.prompt_filter import PromptFilter
from lowtide.runtime.profiling.profiler import DECODE, FILTER, PREFILL, SILENT, Profiler

if TYPE_CHECKING:
    from lowtide.models.model import Logits, Logits2D


class KVSession:
    """Keeps the KV cache and the list of its tokens in step, whatever interrupts them.

    `controller` tells the attention kernels what kind of pass comes, `growth` reserves the cache's bytes,
    `profiler` times the passes, `prefixes` keeps what another prompt replaces, `prompt_filter` shortens
    long prompts. Tokens from `exact_until` on have keys and values that an approximate pass computed.
    """

    def __init__(
        self,
        model: Model,
        controller: PassController | None = None,
        growth: KVReservation | None = None,
        profiler: Profiler = SILENT,
        prompt_filter: PromptFilter | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self._model = model
        self._controller = controller or PassController()
        self._growth = growth
        self._profiler = profiler
        self._filter = prompt_filter
        self._prefixes = prefixes or PrefixCache(0)
        self.token_ids: list[int] = []
        self.exact_until = 0

    @property
    def is_full(self) -> bool:
        """Whether the context has no room for another token."""
        return len(self.token_ids) >= self._model.context

    def admit(self, num_tokens: int) -> None:
        """Reserve the cache's bytes for `num_tokens` in all; raises `OverBudget` where there is no room."""
        if self._growth is not None:
            self._growth.admit(num_tokens)

    @property
    def num_free(self) -> int:
        """How many more tokens the context has room for."""
        return self._model.context - len(self.token_ids)

    @property
    def has_room(self) -> bool:
        """Whether the budget has room for another token; it is reserved then."""
        try:
            self.admit(len(self.token_ids) + 1)
        except OverBudget:
            return False
        return True

    def shortened(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Return what of a prompt is to be computed; makes room for a filter that keeps nothing itself."""
        if self._filter is None or not self._filter.applies_to(token_ids):
            return token_ids
        if not self._filter.keeps:
            self.evict()
        self._controller.begin_prefill()  # its passes are a prompt's, whatever was decoded before
        with self._profiler.span(FILTER, len(token_ids)):
            kept = self._filter.filtered(token_ids)
        self._profiler.filtered(self._filter.retention_map)
        return kept

    def truncate_to_prefix(self, token_ids: Sequence[int]) -> int:
        """Go back to the longest common beginning with `token_ids` and return its length.

        At least the last token is left to compute, since its logits are wanted. Also removes what an
        interrupted pass may have left behind.
        """
        common = common_prefix(self.token_ids, token_ids)
        with self._profiler.span("rewind"):
            kept = self._model.truncate(max(min(common, len(token_ids) - 1), 0))
        del self.token_ids[kept:]
        self.admit(kept)
        self.exact_until = min(self.exact_until, kept)
        return kept

    def restore(self, token_ids: Sequence[int]) -> bool:
        """Go to the kept state that has the most of `token_ids`, where it has more than the session.

        Return whether that was so; `truncate_to_prefix` then cuts it to what is common. What the session holds and
        would lose is kept before.
        """
        if not self._prefixes.limit_bytes:
            return False
        self.sync()
        wanted = token_ids[:-1]  # the last one's logits are wanted: it is computed in any case
        common = common_prefix(self.token_ids, wanted)
        found = self._prefixes.find(wanted, longer_than=common)
        self._keep(num_staying=0 if found else common, besides=found)
        return found is not None and self._put_back(found)

    def _keep(self, num_staying: int = 0, besides: CachedPrefix | None = None) -> None:
        if num_staying < len(self.token_ids):
            with self._profiler.span("prefix cache"):
                self._prefixes.keep(
                    self._model,
                    self.token_ids,
                    self.exact_until,
                    num_staying=num_staying,
                    besides=besides,
                )

    def _put_back(self, kept: CachedPrefix) -> bool:
        """Be where the state was taken; where that fails the tokens are read again."""
        try:
            self.admit(kept.num_tokens)
        except OverBudget:
            return False
        self.token_ids, self.exact_until = [], 0
        try:
            with self._profiler.span("rewind"):
                self._model.put_kv(kept.state, kept.num_tokens)
        except SnapshotError:
            self._prefixes.discard(kept)
            return False
        self.token_ids, self.exact_until = list(kept.token_ids), kept.exact_until
        return True

    def evict(self) -> None:
        """Give the KV cache's memory up, but for what the prefix cache keeps."""
        self.sync()
        self._keep()
        self.forget()

    def forget(self) -> None:
        """Give up everything that was computed: the next prompt is read again."""
        self._model.truncate(0)
        self.token_ids.clear()
        self.exact_until = 0
        self.admit(0)

    def append(self, token_ids: Sequence[int]) -> Logits:
        """Compute tokens of a prompt, at most `batch_size`, exactly; return the last one's logits.

        Raises `OverBudget`, before anything is computed, where the cache may not grow so far.
        """
        self.admit(len(self.token_ids) + len(token_ids))
        self._controller.begin_prefill()
        was_exact = self.exact_until == len(self.token_ids)
        with self._profiler.span(PREFILL, len(token_ids)):
            logits = self._model.forward(token_ids)
        self.token_ids.extend(token_ids)
        if was_exact:
            self.exact_until = len(self.token_ids)
        return logits

    def decode(self, token_ids: Sequence[int]) -> Logits:
        """Compute tokens after the prompt as the policy has them; return the last one's logits.

        When the policy's correction is due, they and those before them are computed again, exactly
        (TidalDecode's KV cache correction).
        """
        self._take_off_drafts()
        self.admit(len(self.token_ids) + len(token_ids))
        self._controller.begin_decode()
        with self._profiler.span(DECODE, len(token_ids)):
            logits = self._model.forward(token_ids)
        self.token_ids.extend(token_ids)
        interval = self._controller.correction_interval
        if interval is not None and len(self.token_ids) - self.exact_until >= interval:
            return self._correct()
        return logits

    def verify(self, tree: TokenTree) -> Logits2D:
        """Compute a token and the drafts after it in one pass; return the logits of the tree's first rows.

        Row 0 is the session's, the others once they are accepted: until then, and where they never are,
        the cache holds more than the session, which the next pass takes off. Their cells are the plan's
        for speculation. Branches may be left out, as in `Model.forward_tree`.
        """
        self._take_off_drafts()
        self.admit(len(self.token_ids) + 1)
        self._controller.begin_decode()
        with self._profiler.span(DECODE, len(tree)):
            rows = self._model.forward_tree(tree)
        self.token_ids.append(tree.token_ids[0])
        return rows

    def accept(self, token_id: int, row: int) -> None:
        """Take a row of the last verification, which is in the cache already, as the next token."""
        self._model.commit_branch(row)
        self.token_ids.append(token_id)

    def _take_off_drafts(self) -> None:
        if self._model.num_tokens > len(self.token_ids):
            self.sync()

    def sync(self) -> int:
        """Forget what an interrupted pass may have left behind, and return how many tokens there are."""
        del self.token_ids[self._model.truncate(len(self.token_ids)) :]
        self.exact_until = min(self.exact_until, len(self.token_ids))
        return len(self.token_ids)

    def save_kv(self, path: Path) -> int:
        """Write the KV cache of the session's tokens, settled before, to a file and return its bytes."""
        return self._model.save_kv(path, self.token_ids)

    def load_kv(self, path: Path, num_bytes: int, num_tokens: int, exact_until: int) -> None:
        """Be the session whose state is the beginning of a file; an empty one where that fails."""
        self.token_ids, self.exact_until = [], 0
        self.token_ids = self._model.load_kv(path, num_bytes, num_tokens)
        self.exact_until = min(exact_until, len(self.token_ids))

    def _correct(self) -> Logits:
        again = self.token_ids[:]
        kept = self.truncate_to_prefix(again[: self.exact_until + 1])
        for start in range(kept, len(again), self._model.batch_size):
            logits = self.append(again[start : start + self._model.batch_size])
        return logits
