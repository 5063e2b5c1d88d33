"""NetworkRule: an answer that is a text of a network, or has such texts between markers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowtide.runtime.structured.rules.byte_table import TextMatcher
from lowtide.runtime.structured.rules.networks.network import END, Network, NetworkReader, Ways
from lowtide.runtime.structured.rules.text_rule import TextRule
from lowtide.runtime.structured.rules.token_order import TokenOrder

if TYPE_CHECKING:
    from lowtide.runtime.structured.rules.text_rule import Mask


class NetworkRule(TextRule):
    """The answer is a text of a network."""

    is_free = False

    def __init__(self, network: Network) -> None:
        self._reader = NetworkReader(network)
        self.start: Ways = self._reader.start

    def step(self, state: Ways, text: bytes) -> Ways | None:
        """Return the readings behind `text`; None where it may not come."""
        found: Ways | None = state
        for byte in text:
            if found is None:
                return None
            found = self._reader.step(found, byte)
        return found

    def legal(self, state: Ways, tokens: TokenOrder) -> Mask:
        """Return which tokens go on with a text of the network."""
        return tokens.walk(state, self.step, self._reader.next_bytes)

    def is_accepting(self, state: Ways) -> bool:
        """Whether a text is complete."""
        return END in state[1]

    def is_done(self, state: Ways) -> bool:
        """Whether no longer text begins like this one."""
        return state == (frozenset(), frozenset([END]))

    def ending(self, state: Ways) -> bytes:
        """Return the rest of a short text."""
        return self._reader.ending(state)

    def forced(self, state: Ways) -> bytes:
        """Return what must come next."""
        return self._reader.forced(state)

    @property
    def num_bytes(self) -> int:
        """Bytes of the network."""
        return self._reader.network.num_bytes


State = tuple[int, Ways | None, int]
"""The matcher's state in free text; the readings inside the markers, None outside; how many texts are complete."""


class MarkedRule(TextRule):
    """Free text in which each start marker is followed by a text of a network, whose end has the end marker.

    At least `least` such texts come. Free text never has an end marker alone: nothing asks what it means.
    """

    def __init__(self, network: Network, marker: bytes, least: int) -> None:
        self._reader = NetworkReader(network)
        self._marker, self._least = marker, least
        self._matcher = TextMatcher([marker], is_absorbing=True)
        self._hit = len(marker)
        self.start: State = (0, None, 0)

    def step(self, state: State, text: bytes) -> State | None:
        """Return the state behind `text`; None where it may not come."""
        at, ways, count = state
        for byte in text:
            if ways is None:
                at = self._matcher.table.step(at, byte)
                if at == self._hit:
                    at, ways = 0, self._reader.start
                continue
            ways = self._reader.step(ways, byte)
            if ways is None:
                return None
            if END in ways[1]:
                ways, count = None, min(count + 1, self._least)
        return at, ways, count

    def legal(self, state: State, tokens: TokenOrder) -> Mask:
        """Return which tokens may come."""
        import numpy as np

        at, ways, _ = state
        if ways is not None:
            return tokens.walk(state, self.step, self._next_bytes) | ~tokens.has_text
        behind = tokens.follow(self._matcher.table, at)
        legal: Mask = behind != self._hit
        for token_id in np.flatnonzero(~legal).tolist():
            legal[token_id] = self.step(state, tokens.bytes_of(token_id)) is not None
        return legal

    def _next_bytes(self, state: State) -> bytes:
        ways = state[1]
        return bytes(range(256)) if ways is None else self._reader.next_bytes(ways)

    def is_accepting(self, state: State) -> bool:
        """Whether the answer may end: outside the markers, behind enough texts."""
        return state[1] is None and state[2] >= self._least

    def ending(self, state: State) -> bytes:
        """Return the rest of the open text, and as many others as are missing."""
        at, ways, count = state
        written = b""
        if ways is not None:
            written, count = self._reader.ending(ways), count + 1
        elif at and count < self._least:
            written, count = self._marker[at:] + self._whole(), count + 1
        return written + (self._marker + self._whole()) * max(self._least - count, 0)

    def _whole(self) -> bytes:
        return self._reader.ending(self._reader.start)

    def forced(self, state: State) -> bytes:
        """Return what must come next inside the markers."""
        return b"" if state[1] is None else self._reader.forced(state[1])

    @property
    def num_bytes(self) -> int:
        """Bytes of the network and of the marker."""
        return self._reader.network.num_bytes + self._matcher.table.num_bytes
