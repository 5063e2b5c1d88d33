"""SavedChats: saves and loads a runtime's chat with its KV cache, so that going on equals never having left."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from lowtide.attention.bindings.library import guarded_aborts
from lowtide.memory.plan.estimates import session_bytes
from lowtide.memory.plan.line import PREFIXES
from lowtide.memory.units import OverBudget
from lowtide.models.arguments.paths import user_path
from lowtide.models.chat_template import Message, checked_message
from lowtide.models.errors import SnapshotError
from lowtide.runtime.arguments import checked_messages
from lowtide.runtime.errors import TranscriptError
from lowtide.runtime.generation.turns import LastTurn
from lowtide.runtime.kv.session import KVSession
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.sessions.file import (
    ChatFile,
    ChatHeader,
    Transcript,
    open_chat,
    write_chat,
)

COMPONENT = "session file"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedChat:
    """Tokens of the KV snapshot in the file (0: messages alone), and the file's bytes."""

    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedChat:
    """The messages in the file, the name of the model that answered, and the tokens in the KV cache.

    With 0 tokens the next answer computes the messages again.
    """

    messages: tuple[dict[str, str], ...]
    model: str
    num_tokens: int


class SavedChats:
    """Made by `Runtime`. `start` ends a running answer; no forward pass runs in a block of `alone`.

    `template` is the source of the chat template: the roles that it names are saved, too.
    """

    def __init__(
        self,
        engine: Engine,
        session: KVSession,
        last: LastTurn,
        *,
        template: str = "",
        start: Callable[[], int],
        alone: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._engine = engine
        self._session = session
        self._last = last
        self._template = template
        self._start = start
        self._alone = alone

    def save(
        self, path: str | os.PathLike[str], messages: Sequence[Message] = (), *, state: bool = True
    ) -> SavedChat:
        """Write `messages` and a snapshot of the KV cache; an older file stays whole on failure.

        With `state=False`, or with an empty cache, the file is JSON with the messages alone. Raises
        `TranscriptError` with the system's reason, and `OverBudget` where the buffer for the snapshot does not fit.
        """
        is_empty = isinstance(messages, Sequence) and not messages
        messages = () if is_empty else checked_messages(messages)
        with self._alone():
            return self._save(user_path("path", path), messages, state=state)

    def _save(self, path: Path, messages: Sequence[Message], *, state: bool) -> SavedChat:
        model = self._engine.model
        transcript = Transcript(
            model=model.spec.name,
            messages=tuple(checked_message(one, self._template) for one in messages),
        )
        num_tokens = self._session.sync() if state and model.supports_snapshot else 0
        if not num_tokens:
            transcript.save(path)
            return SavedChat(num_tokens=0, num_bytes=path.stat().st_size)
        header = ChatHeader(
            properties=self._properties(),
            num_tokens=num_tokens,
            exact_until=self._session.exact_until,
            last=self._last,
            transcript=transcript,
        )
        with self._reserved(num_tokens, 0):
            num_bytes = write_chat(path, self._session.save_kv, header.to_dict())
        return SavedChat(num_tokens=num_tokens, num_bytes=num_bytes)

    def load(self, path: str | os.PathLike[str]) -> LoadedChat:
        """Check the file and load its KV snapshot; a running answer ends.

        Raises `SnapshotMismatch` where the snapshot is of another model, KV type or attention or does not fit the
        context, and `OverBudget` where the buffer does not fit: `read_messages` reads such a file. Raises
        `TranscriptError` where it is damaged or not a saved chat. After an error the next answer computes the
        messages again, at worst.
        """
        with self._alone():
            return self._load(user_path("path", path))

    def _load(self, path: Path) -> LoadedChat:
        with open_chat(path) as file:
            if file is None:
                transcript = self._read_transcript(path)
                return LoadedChat(
                    messages=transcript.messages, model=transcript.model, num_tokens=0
                )
            with self._reserved(0, file.num_header_bytes):
                header = ChatHeader.from_dict(path, file.header())
            header.require_match(path, self._properties(), self._engine.model.context)
            with self._reserved(header.num_tokens, file.num_header_bytes, file.num_snapshot_bytes):
                self._session.reserve(header.num_tokens)
                self._load_kv(file, header)
        return LoadedChat(
            messages=header.transcript.messages,
            model=header.transcript.model,
            num_tokens=len(self._session.token_ids),
        )

    def read_messages(self, path: str | os.PathLike[str]) -> tuple[dict[str, str], ...]:
        """Check the file and return its messages, whichever model answered them; nothing else changes."""
        path = user_path("path", path)
        with self._alone(), open_chat(path) as file:
            if file is None:
                return self._read_transcript(path).messages
            with self._reserved(0, file.num_header_bytes):
                return Transcript.from_dict(path, file.header()).messages

    def _read_transcript(self, path: Path) -> Transcript:
        with self._reserved(0, path.stat().st_size):
            return Transcript.load(path)

    def _properties(self) -> dict[str, str]:
        policy = self._engine.planned.policy
        return {**self._engine.model.snapshot_properties(), "attention": policy.cache_key}

    def _load_kv(self, file: ChatFile, header: ChatHeader) -> None:
        self._start()
        self._last.set("", [], 0)
        try:
            with guarded_aborts():
                self._session.load_kv(
                    file.snapshot_path,
                    file.num_snapshot_bytes,
                    header.num_tokens,
                    header.exact_until,
                )
            file.require_unchanged()
        except (SnapshotError, TranscriptError) as error:
            self._session.truncate_to_prefix(())
            raise TranscriptError(
                f"{file.path} has a KV snapshot that cannot be read ({error}); go on with its messages alone"
            ) from None
        last = header.last
        self._last.set(last.text, last.token_ids, last.num_messages, last.span_lengths)

    @contextlib.contextmanager
    def _reserved(
        self, num_tokens: int, num_text_bytes: int, num_snapshot_bytes: int | None = None
    ) -> Iterator[None]:
        """Reserve what reading or writing a file takes for a moment.

        No prompt is tokenised and no token added meanwhile, so their memory is used; where that is too little, the
        prefix cache's is, too.
        """
        planned, ledger = self._engine.planned, self._engine.ledger
        needed = session_bytes(
            planned.spec, num_tokens, planned.plan.kv_type, num_text_bytes, num_snapshot_bytes
        )
        needed -= self._engine.idle_bytes(max(num_tokens, len(self._session.token_ids)))
        try:
            ledger.reserve(COMPONENT, max(needed, 0))
        except OverBudget:
            self._engine.prefixes.clear()
            ledger.reserve(COMPONENT, max(needed - ledger.components.get(PREFIXES, 0), 0))
        try:
            yield
        finally:
            ledger.release(COMPONENT)
