"""Between turns: the choice follows acceptance, within what was planned and where there is room."""

from __future__ import annotations

from promising_drafts import CHEAP_PASSES

from lowtide.memory.plan.speculation.allocator import SpeculationChoice, SpeculationPoint
from lowtide.runtime.speculation.counts import AcceptanceCounts
from lowtide.runtime.speculation.replanning import (
    MIN_NEW_TOKENS,
    RECENT_TOKENS,
    Replanner,
    TurnPlan,
)

POINTS = [
    SpeculationPoint(
        choice=SpeculationChoice(drafts=("model",), verify_batch=rows),
        num_bytes=rows * 200_000,
        speed_up=1.0,
    )
    for rows in range(2, 13)
]


class Conversation:
    """A replanner that was planned for 8 tokens, with the counts of its turns."""

    def __init__(self, *, may_watch: bool = True) -> None:
        self.rows: list[int] = []
        self.has_room = True
        self.counts = AcceptanceCounts()
        self.replanner = Replanner(
            POINTS,
            POINTS[6],
            AcceptanceCounts.of_rate("model", 0.9).scaled_to(100),
            token_share=0.0,
            may_watch=may_watch,
            resize=self._resize,
        )

    def _resize(self, num_rows: int) -> bool:
        if self.has_room:
            self.rows.append(num_rows)
        return self.has_room

    def turn(self, rate: float, num_tokens: int = 100) -> TurnPlan | None:
        self.counts.add(AcceptanceCounts.of_rate("model", rate).scaled_to(num_tokens))
        return self.replanner.between_turns(self.counts, CHEAP_PASSES)


def test_it_verifies_less_where_drafts_are_wrong_and_more_once_they_are_right_again() -> None:
    chat = Conversation()
    right = chat.turn(0.9)
    assert right is not None and right.verify_batch == 8 and right.promised is not None
    wrong = [chat.turn(0.0) for _ in range(30)]
    assert [plan for plan in wrong if plan is None] == []
    assert chat.rows == sorted(chat.rows, reverse=True)
    last = wrong[-1]
    assert last is not None and last.verify_batch == 1 and last.promised is None
    assert last.reason is not None and "drafts are watched" in last.reason
    again = [chat.turn(0.9) for _ in range(30)][-1]
    assert again is not None and again.verify_batch == 8 and again.reason is None
    assert max(chat.rows) == 8, "more than was planned"


def test_a_draft_model_that_the_user_named_is_never_given_up() -> None:
    chat = Conversation(may_watch=False)
    for _ in range(30):
        plan = chat.turn(0.0)
    assert plan is not None and plan.verify_batch == 2


def test_nothing_changes_where_there_is_no_room() -> None:
    chat = Conversation()
    for _ in range(30):
        chat.turn(0.0)
    chat.has_room = False
    assert [chat.turn(0.9) for _ in range(30)] == [None] * 30
    chat.has_room = True
    plan = chat.turn(0.9)
    assert plan is not None and plan.verify_batch == 8


def test_a_few_tokens_change_nothing_and_old_ones_are_forgotten() -> None:
    chat = Conversation()
    assert chat.turn(0.0, MIN_NEW_TOKENS - 1) is None
    chat.turn(0.9, 100 * RECENT_TOKENS)
    for _ in range(2 * RECENT_TOKENS // 100 * 4):
        plan = chat.turn(0.0)
    assert plan is not None and plan.verify_batch == 1
