"""SpeculationArg: the text of the `speculate` option as a value, and what it means for a memory plan."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.memory.plan.speculation.choices import DraftTables, SpeculationConfig
from lowtide.models.arguments.names import option
from lowtide.models.arguments.paths import exists, user_path
from lowtide.models.arguments.values import shown, text
from lowtide.models.catalog import resolve
from lowtide.models.errors import BadOption
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.kind import require_decoder
from lowtide.models.read_spec import require_original
from lowtide.models.spec import ModelSpec
from lowtide.runtime.speculation.worth import speculation_worth

OFF = "off"
FREE_DRAFTS = ("ngram", "trigram")
AUTO = "auto"
MAX_DRAFT = 31
DEFAULT_DRAFT = 7
TABLES = {
    "ngram": DraftTables(name="ngram", table_bytes=96 * 1024, token_bytes=17),
    "trigram": DraftTables(name="trigram", table_bytes=544 * 1024, token_bytes=13),
}
"""The trigram table, the hash heads of prompt lookup and the acceptance counts, as measured; and for each token of the
context the text, the hash chain of prompt lookup, a copy while they grow by an eighth, and one of a new text."""
MODEL_TABLES = DraftTables(name="model", token_bytes=16)
DRAFT = ":draft="
_OTHER_SETTING = re.compile(
    rf"^(?:{OFF}|{AUTO}|{'|'.join(FREE_DRAFTS)})[:,]|:\s*\w+\s*=[^/]*$", re.IGNORECASE
)
"""A setting that is not `draft`, which would otherwise be part of the path of a draft model."""


@dataclass(frozen=True, slots=True)
class SpeculationArg:
    """Drafts that need no model, or the reference of a draft model, and the most draft tokens of a pass."""

    drafts: tuple[str, ...] = ()
    model: str | None = None
    max_draft: int = 0

    @classmethod
    def text(cls, value: Any) -> str:
        """Return the option as a text; the path of a draft model may be an `os.PathLike`."""
        if isinstance(value, os.PathLike):
            value = str(user_path(option("speculate"), value))
        return text(
            option("speculate"), value, "off, ngram, trigram, auto or the path of a draft model"
        )

    @classmethod
    def parse(cls, text: str) -> SpeculationArg:
        """Read "off", "ngram", "trigram", "auto" (both) or the reference of a draft model.

        Each but "off" may end in ":draft=N", the most draft tokens that a pass verifies. Raises `BadOption` where
        N is not a number of tokens in range.
        """
        name, has_draft, number = text.partition(DRAFT)
        max_draft = DEFAULT_DRAFT
        if has_draft:
            max_draft = int(number) if number.isdecimal() and len(number) < 4 else 0
            if not 1 <= max_draft <= MAX_DRAFT:
                raise BadOption(
                    f"{option('speculate')} is {shown(text)}; draft must be between 1 and {MAX_DRAFT} tokens, "
                    f"or set {option('speculate', OFF)}"
                )
        if not name.strip():
            raise BadOption(
                f"{option('speculate')} is empty; it must be off, ngram, trigram, auto or the path of a draft "
                "model"
            )
        if _OTHER_SETTING.search(name) and not exists(Path(name)):
            raise BadOption(
                f"{option('speculate')} is {shown(text)}; its only setting is draft, as in ngram:draft=4"
            )
        if name == OFF:
            return cls()
        if name == AUTO:
            return cls(FREE_DRAFTS, None, max_draft)
        return cls((name,), None, max_draft) if name in FREE_DRAFTS else cls((), name, max_draft)

    @property
    def is_off(self) -> bool:
        """Whether nothing is drafted."""
        return not self.drafts and self.model is None

    def resolve(
        self,
        target: ModelSpec,
        *,
        key: str,
        kv_type: str,
        branches: bool,
        offline: bool = False,
    ) -> SpeculationConfig | None:
        """Return what the plan must know, None where speculation is off; reads a draft model's header.

        `key` names what the costs of passes depend on, `kv_type` is the preferred one, and `branches` says whether
        drafts may be trees. Raises `ModelNotFound` if the draft model does not exist, `UnsupportedModel` if it
        generates no text, and `BadOption` if its vocabulary differs from the target's.
        """
        if self.is_off:
            return None
        draft, tables = None, tuple(TABLES[name] for name in self.drafts)
        if self.model is not None:
            draft = require_original(read_spec(resolve(self.model, offline=offline)))
            require_decoder(draft, draft.kind)
            require_vocabulary(draft, target)
            tables = (MODEL_TABLES,)
        names = tuple(one.name for one in tables)
        return SpeculationConfig(
            verify_batch=self.max_draft + 1,
            worth=speculation_worth(target, key, kv_type, names, draft),
            drafts=tables,
            draft_model=draft,
            branches=branches,
            costs_key=key,
        )


def require_vocabulary(draft: ModelSpec, target: ModelSpec) -> None:
    """Raise `BadOption` where the headers show that a draft model's vocabulary is not the target's."""
    expected, found = target.vocabulary, draft.vocabulary
    if (expected.num_tokens, expected.text_bytes) == (found.num_tokens, found.text_bytes):
        return
    raise BadOption(
        f"the draft model {draft.name} has a vocabulary of {found.num_tokens:,} tokens "
        f"({found.text_bytes:,} bytes), but {target.name} has one of {expected.num_tokens:,} "
        f"({expected.text_bytes:,} bytes); use a smaller model of the same family, or "
        f"{option('speculate', AUTO)}"
    )
