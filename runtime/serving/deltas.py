"""What an answer is made of, whatever protocol it is sent in: text, log probabilities, calls of tools, its end."""

from __future__ import annotations

from dataclasses import dataclass, field

from lowtide.runtime.generation.logprobs import TokenLogprob
from lowtide.runtime.generation.result import GenerationChunk
from lowtide.runtime.generation.statistics import Statistics
from lowtide.runtime.tools.reader import CallDelta, CallReader


@dataclass(frozen=True, slots=True)
class Finish:
    """Why an answer ended ("stop", "length" or "tool_calls"), lowtide's own reason, and what it cost."""

    reason: str
    own_reason: str
    stats: Statistics

    @classmethod
    def of(cls, own_reason: str, stats: Statistics, *, has_calls: bool = False) -> Finish:
        """Return the end of an answer.

        One that its constraint closed is whole: it ends with "stop", although tokens or memory ran out.
        """
        structured = stats.structured or {}
        is_whole = own_reason == "stop" or bool(structured.get("closed"))
        reason = "tool_calls" if has_calls and is_whole else "stop" if is_whole else "length"
        return cls(reason, own_reason, stats)


@dataclass(frozen=True, slots=True)
class Delta:
    """What is added to an answer; the last one has `finish`."""

    text: str = ""
    logprobs: TokenLogprob | None = None
    calls: tuple[CallDelta, ...] = ()
    finish: Finish | None = None


@dataclass(slots=True)
class Call:
    """A whole call of a tool; `arguments` are JSON text."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Answer:
    """A whole answer, put together from its deltas."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, delta: Delta) -> None:
        """Append a delta."""
        self.text += delta.text
        if delta.logprobs is not None:
            self.logprobs.append(delta.logprobs)
        for call in delta.calls:
            if call.id is not None:
                self.calls.append(Call(call.id, call.name or ""))
            self.calls[call.index].arguments += call.arguments
        self.finish = delta.finish or self.finish


def delta_of(chunk: GenerationChunk) -> Delta:
    """Return what a chunk adds to an answer that calls no tools."""
    finish = None
    if chunk.finish_reason is not None:
        finish = Finish.of(chunk.finish_reason, chunk.stats)
    return Delta(chunk.text, chunk.logprobs, (), finish)


class CallDeltas:
    """Makes deltas of the chunks of an answer that may call tools."""

    def __init__(self, reader: CallReader) -> None:
        self._reader = reader

    def __call__(self, chunk: GenerationChunk) -> Delta:
        """Return what a chunk adds to the answer."""
        reader, finish = self._reader, None
        marker = "" if chunk.token_id is None else reader.control.get(chunk.token_id, "")
        text, calls = reader.push(marker + chunk.text)
        if chunk.finish_reason is not None:
            text += reader.finish()
            has_calls = reader.num_calls > 0
            finish = Finish.of(chunk.finish_reason, chunk.stats, has_calls=has_calls)
        return Delta(text, chunk.logprobs, calls, finish)
