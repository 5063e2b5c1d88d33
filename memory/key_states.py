"""KeyStates: what a plan must know of keys that are kept as states beside the cache.

Knows no policy.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowtide.memory.footprint import attention_bytes, kv_cells
from lowtide.memory.key_groups import PAGE_KEYS
from lowtide.models.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyStates:
    """Of `num_units` layers and KV heads what stands for blocks of `block` channels, in pages of 64.

    `opened`: decoding looks at some keys themselves.
    """

    num_units: int
    block: int
    opened: bool = False

    def num_bytes(self, num_cells: int, key_size: int) -> int:
        """Return the most that states of so many cells take: every block sent, in half precision, of each
        block of a page which keys are alike, and where the page begins."""
        pages = num_cells // PAGE_KEYS
        sent = 2 * (pages * PAGE_KEYS * key_size + 16)
        groups = (PAGE_KEYS + 1) * pages * (key_size // self.block)
        return self.num_units * (sent + groups + 16 * (pages + 1))


def state_bytes(spec: ModelSpec, states: KeyStates, context: int, threads: int) -> int:
    """Return the most that attention over states takes beside that of every key: the states, were every
    block sent, and a scratch alike."""
    held = states.num_bytes(kv_cells(context), spec.key_head_size)
    return held + attention_bytes(spec, context, threads)
