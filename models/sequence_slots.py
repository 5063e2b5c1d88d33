"""SlotTable: which KV slots each sequence of a batch holds.

Sequences may begin with the same tokens, whose slots they then hold together: a slot is free when no sequence holds it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from heapq import heappop, heappush


class FreeSlots:
    """Allocates the slots 0 to `num_slots` - 1, always the lowest free one."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._num_untouched = 0
        """The lowest slot that was never allocated."""
        self._freed: list[int] = []

    def __len__(self) -> int:
        """Return how many slots are free."""
        return self._num_slots - self._num_untouched + len(self._freed)

    def take(self) -> int:
        """Allocate the lowest free slot and return it; raise `IndexError` where none is free."""
        if self._freed:
            return heappop(self._freed)
        if self._num_untouched == self._num_slots:
            raise IndexError("no slot is free")
        self._num_untouched += 1
        return self._num_untouched - 1

    def free(self, slots: Iterable[int]) -> None:
        """Make allocated slots free again."""
        for slot in slots:
            heappush(self._freed, slot)


class SlotTable:
    """The slots of `num_sequences` sequences, each in the order of its tokens, in a cache of `num_slots` slots."""

    def __init__(self, num_sequences: int, num_slots: int) -> None:
        self.num_slots = num_slots
        self._slots = [array("i") for _ in range(num_sequences)]
        self._num_holders = array("i", bytes(4 * num_slots))
        self._free = FreeSlots(num_slots)

    @property
    def num_free(self) -> int:
        """How many slots no sequence holds."""
        return len(self._free)

    def slots(self, sequence: int) -> array[int]:
        """Return the slots of a sequence; the caller does not change them."""
        return self._slots[sequence]

    def num_held(self, sequences: Iterable[int], sequence: int, num_tokens: int) -> int:
        """Return how many slots these sequences hold together with the first tokens of another one."""
        held = set(self._slots[sequence][:num_tokens])
        return len(held.union(*(self._slots[one] for one in sequences)))

    def append(self, sequence: int, num_tokens: int) -> None:
        """Give a sequence the lowest free slots for more tokens; raise `IndexError` where there are too few."""
        for _ in range(num_tokens):
            slot = self._free.take()
            self._slots[sequence].append(slot)
            self._num_holders[slot] = 1

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Let `target`, which holds no slot, hold those of the first tokens of `source`, too."""
        assert not self._slots[target], "the sequence has tokens"
        self._slots[target] = self._slots[source][:num_tokens]
        for slot in self._slots[target]:
            self._num_holders[slot] += 1

    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Take the slots from token `num_tokens` on from a sequence; those that nobody else holds are free."""
        slots = self._slots[sequence]
        for slot in slots[num_tokens:]:
            self._num_holders[slot] -= 1
            if not self._num_holders[slot]:
                self._free.free((slot,))
        del slots[num_tokens:]
