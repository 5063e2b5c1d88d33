"""BatchSpeculation: shares a pass out among the answers of a batch, for what is drafted for each.

One pass verifies the drafts of all. What it costs depends on its rows, whoever they are of; whether they
were worth it is kept for all together. Knows no model and no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowtide.memory.row_shares import share_rows
from lowtide.runtime.member_speculation import MemberSpeculation
from lowtide.runtime.pass_costs import PassCosts
from lowtide.runtime.speculation_control import LEAST_GAIN, LOST_SHARE, MOST_CREDIT_STEPS

if TYPE_CHECKING:
    from lowtide.runtime.batch_member import BatchMember


class BatchSpeculation:
    """Chooses before each pass how many rows each of `members`, by index, gets for its drafts.

    A pass has at most the rows of `costs`. `rows_agree` says whether a row was found to be what it is alone
    among so many.
    """

    def __init__(
        self, members: Sequence[MemberSpeculation], costs: PassCosts, *, rows_agree: bool
    ) -> None:
        self.members = tuple(members)
        self.rows_agree = rows_agree
        self._costs = costs
        self._passing: Sequence[BatchMember] = ()
        self._started_at = self._pass_s = 0.0
        self._decoded_s = self._won_s = 0.0

    def draft(self, active: Sequence[BatchMember]) -> None:
        """Set what is verified for each in the pass that comes now, which computes one token of each."""
        offered = [
            self.members[member.index].offered(member.text, member.num_free) for member in active
        ]
        shares = share_rows(
            offered, self._costs.of, most_rows=self._costs.most_rows, least_gain=LEAST_GAIN
        )
        for member, num_drafted in zip(active, shares.num_drafted, strict=True):
            number = 0 if self._has_lost else num_drafted
            member.drafted = self.members[member.index].taken(number, shares.gain)
        self._passing = tuple(active)
        self._started_at = self._costs.clock()

    def passed(self) -> None:
        """The pass is over: its time goes into the costs, and each answer has its share of it."""
        self._pass_s = self._costs.clock() - self._started_at
        self._decoded_s += self._pass_s
        num_plain = len(self._passing)
        num_rows = num_plain + sum(len(member.drafted) for member in self._passing)
        self._costs.observe(num_rows, self._pass_s, plain_rows=num_plain)
        for member in self._passing:
            self.members[member.index].passed(
                self._pass_s, num_members=num_plain, has_drafts=bool(member.drafted)
            )

    def settled(self, num_tokens: int) -> None:
        """All answers together have so many tokens of the pass: what verifying won or lost is kept.

        Gains of before stand for later losses up to `MOST_CREDIT_STEPS` passes without drafts.
        """
        if not any(member.drafted for member in self._passing):
            return
        plain_s = self._costs.of(len(self._passing))
        won_s = self._won_s + num_tokens / len(self._passing) * plain_s - self._pass_s
        self._won_s = min(won_s, MOST_CREDIT_STEPS * plain_s)

    def close(self) -> None:
        """Close the drafts; closing twice is allowed."""
        for member in self.members:
            member.close()

    @property
    def _has_lost(self) -> bool:
        """Whether verifying has to wait until more was decoded without it."""
        return -self._won_s > LOST_SHARE * self._decoded_s
