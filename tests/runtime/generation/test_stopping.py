"""Stop texts, however the text arrives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lowtide.runtime.generation.state import StopMatcher

TEXTS = st.text(alphabet="abc", max_size=12)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3)


@given(st.lists(TEXTS, max_size=10), STOPS)
def test_text_up_to_the_first_stop_however_it_is_split(parts: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    stopped = False
    for part in parts:
        text, stopped = matcher.push(part)
        shown += text
        assert not any(stop in shown for stop in stops)
        if stopped:
            break
    so_far = ""
    for part in parts:
        so_far += part
        if any(stop in so_far for stop in stops):
            break
    found = [so_far.find(stop) for stop in stops if stop in so_far]
    if found:
        assert stopped and shown == so_far[: min(found)]
    else:
        assert not stopped and shown + matcher.rest() == so_far


def test_only_a_possible_start_of_a_stop_text_is_held_back() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the E") == ("the ", False)
    assert matcher.push("gg") == ("Egg", False)
    assert matcher.push("EN") == ("", False)
    assert matcher.push("D of it") == ("", True)
