"""SavedChats: keeps a runtime's conversation on disk, so that going on equals never having left.

Knows no terminal; what the files look like is `session_file`'s and `transcript`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowtide.attention.bindings.library import guarded_aborts
from lowtide.memory.plan.estimates import session_bytes
from lowtide.memory.plan.line import PREFIXES
from lowtide.memory.units import OverBudget
from lowtide.models.chat_template import Message, checked_message
from lowtide.models.errors import SnapshotError
from lowtide.runtime.errors import TranscriptError
from lowtide.runtime.generation.chat import LastTurn
from lowtide.runtime.kv.session import KVSession
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.sessions.file import (
    SessionFile,
    SessionHead,
    Transcript,
    opened_session,
    write_session,
)

COMPONENT = "session file"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSession:
    """How many tokens' KV state is in the file (0: messages alone), and the file's bytes."""

    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSession:
    """The messages in the file, the name of the model that answered, and how many tokens are reused.

    `num_tokens` are in the KV cache again; with 0 the messages are read with the next answer.
    """

    messages: tuple[dict[str, str], ...]
    model: str
    num_tokens: int


class SavedChats:
    """Made by `Runtime`. `begin` ends an answer that is being read, `require_open` raises once closed."""

    def __init__(
        self,
        loaded: Engine,
        session: KVSession,
        last: LastTurn,
        *,
        begin: Callable[[], int],
        require_open: Callable[[], None],
    ) -> None:
        self._loaded = loaded
        self._session = session
        self._last = last
        self._begin = begin
        self._require_open = require_open

    def save(
        self, path: str | Path, messages: Sequence[Message] = (), *, state: bool = True
    ) -> SavedSession:
        """Write `messages` and the KV state of the tokens in use; an older file stays whole on failure.

        Without `state`, or where there is none, the file is JSON with the messages alone. Raises
        `TranscriptError` with the system's reason, `OverBudget` where the state's buffer does not fit.
        """
        self._require_open()
        path, model = Path(path), self._loaded.model
        transcript = Transcript(
            model=model.spec.name, messages=tuple(checked_message(message) for message in messages)
        )
        num_tokens = self._session.sync() if state and model.supports_snapshot else 0
        if not num_tokens:
            transcript.save(path)
            return SavedSession(num_tokens=0, num_bytes=path.stat().st_size)
        head = SessionHead(
            component=self._component(),
            num_tokens=num_tokens,
            exact_until=self._session.exact_until,
            last=self._last,
            transcript=transcript,
        )
        with self._reserved(num_tokens, 0):
            num_bytes = write_session(path, self._session.save_kv, head.to_dict())
        return SavedSession(num_tokens=num_tokens, num_bytes=num_bytes)

    def load(self, path: str | Path) -> LoadedSession:
        """Check the file and put its KV state back; an answer that is being read ends.

        Raises `SessionMismatch` where the state belongs to another model, KV type or attention or does not
        fit the context, and `OverBudget` where the buffer does not fit: `read_messages` reads such a file.
        Raises `TranscriptError` where it is damaged or none. At worst the next answer reads all again.
        """
        self._require_open()
        path = Path(path)
        with opened_session(path) as file:
            if file is None:
                transcript = self._plain_transcript(path)
                return LoadedSession(
                    messages=transcript.messages, model=transcript.model, num_tokens=0
                )
            with self._reserved(0, file.num_head_bytes):
                head = SessionHead.from_dict(path, file.head())
            head.require_match(path, self._component(), self._loaded.model.context)
            with self._reserved(head.num_tokens, file.num_head_bytes, file.num_state_bytes):
                self._session.admit(head.num_tokens)
                self._put_back(file, head)
        return LoadedSession(
            messages=head.transcript.messages,
            model=head.transcript.model,
            num_tokens=len(self._session.token_ids),
        )

    def read_messages(self, path: str | Path) -> tuple[dict[str, str], ...]:
        """Check the file and return its messages, whoever answered them; nothing else changes."""
        path = Path(path)
        with opened_session(path) as file:
            if file is None:
                return self._plain_transcript(path).messages
            with self._reserved(0, file.num_head_bytes):
                return Transcript.from_dict(path, file.head()).messages

    def _plain_transcript(self, path: Path) -> Transcript:
        with self._reserved(0, path.stat().st_size):
            return Transcript.load(path)

    def _component(self) -> dict[str, str]:
        policy = self._loaded.planned.policy
        return {**self._loaded.model.snapshot_component(), "attention": policy.cache_key}

    def _put_back(self, file: SessionFile, head: SessionHead) -> None:
        self._begin()
        self._last.set("", [], 0)
        try:
            with guarded_aborts():
                self._session.load_kv(
                    file.state_path, file.num_state_bytes, head.num_tokens, head.exact_until
                )
            file.require_unchanged()
        except (SnapshotError, TranscriptError) as error:
            self._session.truncate_to_prefix(())
            raise TranscriptError(
                f"{file.path} holds a KV state that cannot be read ({error}): go on with its messages alone"
            ) from None
        self._last.set(head.last.text, head.last.token_ids, head.last.num_messages)

    @contextlib.contextmanager
    def _reserved(
        self, num_tokens: int, num_text_bytes: int, num_state_bytes: int | None = None
    ) -> Iterator[None]:
        """Hold what a file takes for a moment.

        No prompt is tokenised meanwhile and no token added, so what is there for them is used; where that
        is too little, the prefix cache's is, too.
        """
        planned, ledger = self._loaded.planned, self._loaded.ledger
        needed = session_bytes(
            planned.spec, num_tokens, planned.plan.kv_type, num_text_bytes, num_state_bytes
        )
        needed -= self._loaded.idle_bytes(max(num_tokens, len(self._session.token_ids)))
        try:
            ledger.reserve(COMPONENT, max(needed, 0))
        except OverBudget:
            self._loaded.prefixes.clear()
            ledger.reserve(COMPONENT, max(needed - ledger.components.get(PREFIXES, 0), 0))
        try:
            yield
        finally:
            ledger.release(COMPONENT)
