"""`Runtime.saved_chats` over the fake model: what is saved, how a chat goes on, what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from saved_talk import MESSAGES, NEXT, TURNS, chat

from lowtide import FakeModel, OverBudget, Runtime
from lowtide.memory.process import read_process_memory
from lowtide.memory.units import MIB
from lowtide.models.errors import LowtideError, TemplateError
from lowtide.runtime.backends.gguf_baseline import TOLERANCE_BYTES
from lowtide.runtime.errors import RuntimeUnusable, TranscriptError
from lowtide.runtime.sessions import store as module
from lowtide.runtime.sessions.file import Transcript

Opened = Callable[..., Runtime]


def test_going_on_equals_never_having_left(fake_runtime: Opened, saved: Path) -> None:
    stayed, reloaded = fake_runtime("One.", "Two."), fake_runtime("One.", "Two.")
    chat(stayed, TURNS)
    loaded = reloaded.saved_chats.load(saved)
    assert list(loaded.messages) == MESSAGES and loaded.model == "fake"
    assert loaded.num_tokens == reloaded.fake.num_tokens  # type: ignore[attr-defined]
    expected, found = chat(stayed, NEXT), chat(reloaded, NEXT)
    assert found.token_ids == expected.token_ids and found.text == "Two."
    assert found.stats.reused_tokens == expected.stats.reused_tokens == loaded.num_tokens
    assert reloaded.ledger.components == stayed.ledger.components


def test_the_last_answer_is_saved_as_the_tokens_that_were_sampled(
    fake_runtime: Opened, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenised again, the answer has other tokens here: only those in the file can be reused."""
    runtime = fake_runtime("One.", "Two.")
    loaded = runtime.saved_chats.load(saved)
    tokenizer = runtime.fake.tokenizer  # type: ignore[attr-defined]
    encode = tokenizer.encode
    monkeypatch.setattr(
        tokenizer, "encode", lambda text, **how: [65 if i == 79 else i for i in encode(text, **how)]
    )
    assert chat(runtime, NEXT).stats.reused_tokens == loaded.num_tokens


def test_without_messages_and_without_a_template(tmp_path: Path) -> None:
    def open_runtime() -> Runtime:
        model = FakeModel(("One.",))
        model.spec = replace(model.spec, chat_template=None)
        return Runtime.open(model, memory="8GiB")

    runtime = open_runtime()
    runtime.generate("Hi", temperature=0, max_tokens=2)
    runtime.saved_chats.save(str(tmp_path / "talk"))
    other = open_runtime()
    assert other.saved_chats.load(str(tmp_path / "talk")).messages == ()
    again = other.generate("Hi", temperature=0, max_tokens=2)
    assert again.stats.reused_tokens == again.stats.prompt_tokens - 1


def test_transcripts_without_a_snapshot_load_as_messages(
    fake_runtime: Opened, tmp_path: Path
) -> None:
    path = tmp_path / "talk.json"
    Transcript(model="somebody", messages=tuple(MESSAGES)).save(path)
    runtime = fake_runtime("One.", "Two.")
    loaded = runtime.saved_chats.load(path)
    assert (list(loaded.messages), loaded.model, loaded.num_tokens) == (MESSAGES, "somebody", 0)
    assert chat(runtime, NEXT).text == "Two."


def test_a_model_without_snapshots_saves_its_messages(
    fake_runtime: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeModel, "supports_snapshot", False)
    runtime = fake_runtime("One.")
    chat(runtime, TURNS)
    assert runtime.saved_chats.save(tmp_path / "talk", MESSAGES).num_tokens == 0
    assert Transcript.load(tmp_path / "talk").messages == tuple(MESSAGES)


def test_saving_during_an_answer_does_not_change_it(fake_runtime: Opened, tmp_path: Path) -> None:
    runtime = fake_runtime("A long answer.")
    chunks = runtime.chat(TURNS, temperature=0)
    first = list(itertools.islice(chunks, 3))
    saved = runtime.saved_chats.save(tmp_path / "talk", TURNS)
    assert "".join(p.text for p in [*first, *chunks]) == "A long answer."
    other = fake_runtime("A long answer.")
    assert other.saved_chats.load(tmp_path / "talk").num_tokens == saved.num_tokens
    assert chat(other, TURNS).text == "A long answer."


def test_loading_ends_a_running_answer(fake_runtime: Opened, saved: Path) -> None:
    runtime = fake_runtime("One.", "Two.")
    chunks = runtime.chat([{"role": "user", "content": "another talk"}])
    next(chunks)
    num_tokens = runtime.saved_chats.load(saved).num_tokens
    with pytest.raises(RuntimeUnusable, match="another answer"):
        next(chunks)
    assert chat(runtime, NEXT).stats.reused_tokens == num_tokens


def test_an_interrupted_pass_is_not_saved(
    fake_runtime: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = fake_runtime("One.", "Two.")
    chat(runtime, TURNS)
    runtime.fake.forward([1, 2, 3])  # type: ignore[attr-defined]
    saved = runtime.saved_chats.save(tmp_path / "talk", MESSAGES)
    other = fake_runtime("One.", "Two.")
    assert other.saved_chats.load(tmp_path / "talk").num_tokens == saved.num_tokens
    assert chat(other, NEXT).stats.reused_tokens == saved.num_tokens


def test_what_does_not_fit_the_budget_is_refused(
    fake_runtime: Opened, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = fake_runtime("One.", "Two.")
    chat(runtime, TURNS)
    before = dict(runtime.ledger.components)
    monkeypatch.setattr(module, "session_bytes", lambda *_: 1 << 40)
    for refused in (
        runtime.saved_chats.load,
        runtime.saved_chats.save,
        runtime.saved_chats.read_messages,
    ):
        with pytest.raises(OverBudget, match="session file"):
            refused(saved)
    assert runtime.ledger.components == before
    assert chat(runtime, NEXT).stats.reused_tokens > len("One.")


def test_at_the_lower_bound_a_chat_is_saved_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan has no byte to spare: a file uses the memory that tokenising a prompt would."""
    # Other tests of this process may have used more.
    small = replace(read_process_memory(), resident_bytes=50 * MIB, peak_bytes=50 * MIB)
    for user in ("backends.backend", "backends.gguf_baseline", "loading.load"):
        monkeypatch.setattr(f"lowtide.runtime.{user}.read_process_memory", lambda: small)
    model = FakeModel(("One.", "Two."))
    smallest = Runtime.open(model, memory="8GiB").plan.lower_bound_bytes - TOLERANCE_BYTES
    runtime = Runtime.open(model, memory=smallest)
    assert runtime.ledger.reserved_bytes == smallest
    chat(runtime, TURNS)
    num_tokens = runtime.saved_chats.save(tmp_path / "talk", MESSAGES).num_tokens
    assert runtime.saved_chats.load(tmp_path / "talk").num_tokens == num_tokens > 0


def test_wrong_use_is_refused_in_one_sentence(
    fake_runtime: Opened, tmp_path: Path, saved: Path
) -> None:
    runtime = fake_runtime()
    chat(runtime, TURNS)
    with pytest.raises(TemplateError, match="role 'king'"):
        runtime.saved_chats.save(tmp_path / "x", [{"role": "king", "content": ""}])
    with pytest.raises(TranscriptError, match="was not saved"):
        runtime.saved_chats.save(tmp_path / "no" / "where")
    with pytest.raises(TranscriptError, match="cannot be read: No such file"):
        runtime.saved_chats.load(tmp_path / "none")
    runtime.close()
    for closed in (runtime.saved_chats.save, runtime.saved_chats.load):
        with pytest.raises(RuntimeUnusable, match="closed"):
            closed(saved)


class NoSnapshots(FakeModel):
    """A model of a user's own without snapshots."""

    supports_snapshot = False
    snapshot_properties = FakeModel.__mro__[1].snapshot_properties  # type: ignore[attr-defined]
    save_kv = FakeModel.__mro__[1].save_kv  # type: ignore[attr-defined]
    load_kv = FakeModel.__mro__[1].load_kv  # type: ignore[attr-defined]


def test_a_model_of_ones_own_need_not_support_snapshots(saved: Path) -> None:
    runtime = Runtime.open(NoSnapshots(), memory="8GiB")
    with pytest.raises(LowtideError):
        runtime.saved_chats.load(saved)
    assert list(runtime.saved_chats.read_messages(saved)) == MESSAGES
