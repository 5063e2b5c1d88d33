"""PromptPace: how many tokens of prompts a pass may compute beside the answers that wait for it."""

from __future__ import annotations

MAX_PAUSE_S = 0.25
"""Seconds by which reading prompts may delay the next token of the other answers."""
MIN_TOKENS = 8
"""Tokens of prompts that a pass computes in any case, or a slow model would never read one."""
FIRST_TOKENS = 32
"""Tokens of prompts in a pass before one was timed."""
NEW_SHARE = 0.3
"""Weight of the last pass in the running means."""


class PromptPace:
    """Learns from each pass what a token of a prompt takes, which grows with the text before it."""

    def __init__(self) -> None:
        self._token_s: float | None = None
        self._decode_s = 0.0

    def max_tokens(self, room: int) -> int:
        """Return how many tokens of prompts the next pass may have, at most `room`."""
        if self._token_s is None:
            return min(room, FIRST_TOKENS)
        affordable = int(min(MAX_PAUSE_S / max(self._token_s, 1e-9), room))
        return min(room, max(affordable, MIN_TOKENS))

    def record(self, num_prompt_tokens: int, num_decoding: int, seconds: float) -> None:
        """Record a pass over tokens of prompts beside the last tokens of `num_decoding` answers."""
        if not num_prompt_tokens:
            self._decode_s += NEW_SHARE * (seconds - self._decode_s)
            return
        beside_s = min(self._decode_s, seconds) if num_decoding else 0.0
        token_s = (seconds - beside_s) / num_prompt_tokens
        if self._token_s is None:
            self._token_s = token_s
        self._token_s += NEW_SHARE * (token_s - self._token_s)
