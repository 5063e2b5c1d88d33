"""SpeculationArg: what the user wrote for `speculate`, as a value, and what it means for a plan.

Knows how drafts are made, and nothing of how they are verified.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowtide.memory.plan.speculation import SpeculationConfig
from lowtide.models.catalog import resolve
from lowtide.models.errors import BadOption
from lowtide.models.gguf.spec import read_spec
from lowtide.models.read_spec import require_original
from lowtide.models.spec import ModelSpec

OFF = "off"
FREE_DRAFTS = ("ngram", "trigram")
AUTO = "auto"
MOST_ROWS = 32
DEFAULT_ROWS = 8
TABLE_BYTES = 640 * 1024
"""The tri-gram table and the heads of prompt lookup, as measured, with what counts acceptance."""
TOKEN_BYTES = 16
"""The text in both drafts and the chains, in arrays that grow by an eighth, and the copy that they get."""
ROWS = ":rows="


@dataclass(frozen=True, slots=True)
class SpeculationArg:
    """Drafts by name, or a draft model's reference, and the most rows of a verification."""

    drafts: tuple[str, ...] = ()
    model: str | None = None
    num_rows: int = DEFAULT_ROWS

    @classmethod
    def parse(cls, stated: str) -> SpeculationArg:
        """Return what "off", "ngram", "trigram", "auto" or a model's reference means.

        Each but "off" may end in ":rows=N". Raises `BadOption` where that is no number of rows.
        """
        name, has_rows, written = stated.partition(ROWS)
        num_rows = DEFAULT_ROWS
        if has_rows:
            num_rows = int(written) if written.isdecimal() else 0
            if not 2 <= num_rows <= MOST_ROWS:
                raise BadOption(
                    f"speculate is {stated!r}, 2 to {MOST_ROWS} rows of a verification are wanted: change "
                    "rows, or say off"
                )
        if not name:
            raise BadOption(
                "speculate is empty: say off, ngram, trigram, auto, or a draft model's path"
            )
        if name == OFF:
            return cls()
        if name == AUTO:
            return cls(FREE_DRAFTS, None, num_rows)
        return cls((name,), None, num_rows) if name in FREE_DRAFTS else cls((), name, num_rows)

    @property
    def is_off(self) -> bool:
        """Whether nothing is to be drafted."""
        return not self.drafts and self.model is None

    def wish(self, target: ModelSpec, *, offline: bool = False) -> SpeculationConfig | None:
        """Return what the plan must know; finds a draft model and reads its headers.

        Raises `ModelNotFound` where it is not there, and `BadOption` where its vocabulary is another one.
        """
        if self.is_off:
            return None
        if self.model is None:
            return SpeculationConfig(
                num_rows=self.num_rows, table_bytes=TABLE_BYTES, token_bytes=TOKEN_BYTES
            )
        draft = require_original(read_spec(resolve(self.model, offline=offline)))
        require_vocabulary(draft, target)
        return SpeculationConfig(num_rows=self.num_rows, token_bytes=TOKEN_BYTES, draft_model=draft)


def require_vocabulary(draft: ModelSpec, target: ModelSpec) -> None:
    """Raise `BadOption` where the headers show that a draft's tokens are not the target's."""
    ours, theirs = target.vocabulary, draft.vocabulary
    if (ours.num_tokens, ours.text_bytes) == (theirs.num_tokens, theirs.text_bytes):
        return
    raise BadOption(
        f"the draft {draft.name} has a vocabulary of {theirs.num_tokens:,} tokens "
        f"({theirs.text_bytes:,} bytes), {target.name} one of {ours.num_tokens:,} "
        f"({ours.text_bytes:,} bytes): pick a smaller model of the same family, or speculate with auto"
    )
