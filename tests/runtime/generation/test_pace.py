"""How much of a prompt a pass reads beside the answers that wait for it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lowtide.runtime.generation.pace import FIRST_TOKENS, MAX_PAUSE_S, MIN_TOKENS, PromptPace


def test_the_first_pass_is_short_and_a_fast_model_fills_the_next_ones() -> None:
    pace = PromptPace()
    assert pace.max_tokens(128) == FIRST_TOKENS and pace.max_tokens(5) == 5
    for _ in range(20):
        pace.record(FIRST_TOKENS, 0, FIRST_TOKENS * 0.0005)
    assert pace.max_tokens(128) == 128


@given(token_s=st.floats(1e-5, 10), decode_s=st.floats(0, 5), room=st.integers(MIN_TOKENS, 4096))
def test_passes_stay_inside_the_pause_or_read_the_least(
    token_s: float, decode_s: float, room: int
) -> None:
    pace = PromptPace()
    for _ in range(60):
        pace.record(0, 3, decode_s)
        number = pace.max_tokens(room)
        pace.record(number, 3, decode_s + number * token_s)
    number = pace.max_tokens(room)
    assert number == room or abs(number - max(MAX_PAUSE_S / token_s, MIN_TOKENS)) <= 1 + number / 8


def test_answers_beside_a_prompt_do_not_count_as_its_time() -> None:
    pace = PromptPace()
    for _ in range(60):
        pace.record(0, 4, 0.1)
    pace.record(10, 4, 0.1 + 10 * 0.01)
    assert 20 <= pace.max_tokens(128) <= 30
