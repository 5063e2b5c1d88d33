"""SessionHead: what a session file says beside the KV state. Knows no file and no model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowtide.runtime.conversation import LastAnswer
from lowtide.runtime.errors import SessionMismatch, TranscriptError
from lowtide.runtime.transcript import Transcript


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionHead:
    """Whose KV state it is (`owner`, by property), how many tokens it holds and how to go on from them.

    Tokens from `exact_until` on were computed by an approximate pass.
    """

    owner: dict[str, str]
    num_tokens: int
    exact_until: int
    last: LastAnswer
    transcript: Transcript

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {
            "owner": self.owner,
            "num_tokens": self.num_tokens,
            "exact_until": self.exact_until,
            "last": asdict(self.last),
            **self.transcript.to_dict(),
        }

    @classmethod
    def from_dict(cls, path: Path, values: dict[str, Any]) -> SessionHead:
        """Return the head in a file's JSON; raises `TranscriptError` where it is none."""
        transcript = Transcript.from_dict(path, values)
        try:
            last = values["last"]
            return cls(
                owner={str(name): str(value) for name, value in values["owner"].items()},
                num_tokens=int(values["num_tokens"]),
                exact_until=max(int(values["exact_until"]), 0),
                last=LastAnswer(
                    str(last["text"]),
                    [int(i) for i in last["token_ids"]],
                    int(last["num_messages"]),
                ),
                transcript=transcript,
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise TranscriptError(f"{path} holds values that are none: use a backup") from None

    def require_match(self, path: Path, owner: dict[str, str], context: int) -> None:
        """Raise `SessionMismatch` where the state is not `owner`'s or does not fit the context."""
        for name, ours in owner.items():
            theirs = self.owner.get(name)
            if theirs != ours:
                raise SessionMismatch(
                    f"{path} was saved with the {name} {theirs}, here it is {ours}: open that one, or "
                    "go on with its messages alone"
                )
        if self.num_tokens > context:
            raise SessionMismatch(
                f"{path} holds {self.num_tokens:,} tokens, the context {context:,}: raise --context, or "
                "go on with its messages alone"
            )
