"""The loop of several answers: what they share is read once, then each pass takes all of them a step on, or
several steps, where drafts are verified. Knows no budget and no text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lowtide.attention.policy import Steering
from lowtide.models.sequences import Part, Sequences
from lowtide.models.token_tree import TokenTree
from lowtide.models.tokenizer import common_prefix
from lowtide.runtime.accept import Verification
from lowtide.runtime.batch_member import BatchMember, BatchPrompt
from lowtide.runtime.batch_speculation import BatchSpeculation
from lowtide.runtime.generate import Piece
from lowtide.runtime.profiler import DECODE, PREFILL, SILENT, Profiler
from lowtide.runtime.watchdog import Watchdog

if TYPE_CHECKING:
    from lowtide.models.model import Logits, RowLogits


def num_shared(prompts: Sequence[BatchPrompt]) -> int:
    """Return how many tokens all prompts begin with; each has one more, whose logits are wanted."""
    first, *others = (asked.prompt.token_ids for asked in prompts)
    if not others:
        return 0
    shared = min(common_prefix(first, other) for other in others)
    return max(min(shared, *(len(asked.prompt.token_ids) - 1 for asked in prompts)), 0)


def generate_together(
    sequences: Sequences,
    members: Sequence[BatchMember],
    shared_tokens: int,
    steering: Steering,
    watchdog: Watchdog,
    speculation: BatchSpeculation | None = None,
    profiler: Profiler = SILENT,
) -> Iterator[tuple[int, Piece]]:
    """Yield the pieces of all answers as they come, each with its member's index.

    Member i is sequence i. Prompts are read to the end before anything is decoded after a first token. With
    `speculation` a pass may take an answer on by several tokens; they are the same tokens.
    """
    _read_shared(sequences, members, shared_tokens, steering, profiler)
    active = list(members)
    while active:
        reading = [member for member in active if member.is_reading]
        takes_part = reading or active
        kind = PREFILL if reading else DECODE
        drafting = None if reading else speculation
        if drafting is not None:
            drafting.draft(active)
        (steering.before_prompt if reading else steering.before_decode)()
        parts, complete = _parts(takes_part, sequences.max_rows)
        with profiler.span(kind, sum(len(part.token_ids) for part in parts)):
            rows = sequences.forward(parts)
        if drafting is not None:
            drafting.passed()
        is_over, num_tokens = watchdog.is_over(), 0
        for member, its_rows in zip(complete, _by_member(rows, complete), strict=True):
            for piece in _answered(member, its_rows, profiler, is_over=is_over):
                num_tokens += 1
                yield member.index, piece
            if member.drafted:
                sequences.truncate(member.index, member.computed)
        if drafting is not None:
            drafting.settled(num_tokens)
        active = [member for member in active if not member.is_done]


def _read_shared(
    sequences: Sequences,
    members: Sequence[BatchMember],
    num_tokens: int,
    steering: Steering,
    profiler: Profiler,
) -> None:
    token_ids = members[0].asked.prompt.token_ids[:num_tokens]
    steering.before_prompt()
    for start in range(0, num_tokens, sequences.max_rows):
        taken = token_ids[start : start + sequences.max_rows]
        with profiler.span(PREFILL, len(taken)):
            sequences.forward([Part(0, taken, num_wanted=0)])
    sequences.share()
    for member in members:
        member.begin_behind(num_tokens)


def _parts(members: Sequence[BatchMember], max_rows: int) -> tuple[list[Part], list[BatchMember]]:
    """Return what goes in next, in order, and the members whose next token can be sampled then."""
    parts, complete, room = list[Part](), list[BatchMember](), max_rows
    for member in members:
        if room == 0:
            break
        taken = [*member.taken(room), *member.drafted]
        room -= len(taken)
        num_wanted = 0 if member.pending else 1 + len(member.drafted)
        parts.append(Part(member.index, taken, num_wanted))
        if not member.pending:
            complete.append(member)
    return parts, complete


def _by_member(rows: RowLogits, members: Sequence[BatchMember]) -> Iterator[RowLogits]:
    """Yield of a pass's rows those of each member: one, and one for each of its drafts."""
    start = 0
    for member in members:
        end = start + 1 + len(member.drafted)
        yield rows[start:end]
        start = end


def _answered(
    member: BatchMember, rows: RowLogits, profiler: Profiler, *, is_over: bool
) -> Iterator[Piece]:
    """Yield the piece that each row gives, up to the first whose token is not what was drafted."""
    tree = TokenTree.chain(member.drafted).behind(member.text[-1])
    verification = Verification(tree, rows)
    logits: Logits | None = verification.first
    while logits is not None:
        with profiler.span("sampling"):
            piece = member.answer(logits, is_over=is_over)
        yield piece
        if member.is_done or piece.token_id is None:
            return
        logits = verification.accept(piece.token_id)
        member.follows(piece.token_id, is_accepted=logits is not None)
