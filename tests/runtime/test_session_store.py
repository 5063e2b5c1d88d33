"""`Runtime.session` over the fake model: what is kept, what goes on, what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from saved_talk import NEXT, SAID, TURNS, chat

from lowtide import FakeModel, OverBudget, Runtime
from lowtide.memory.process import read_process_memory
from lowtide.memory.units import MIB
from lowtide.models.errors import LowtideError, TemplateError
from lowtide.runtime.errors import RuntimeUnusable, TranscriptError
from lowtide.runtime.sessions import store as module
from lowtide.runtime.sessions.file import Transcript

Opened = Callable[..., Runtime]


def test_going_on_equals_never_having_left(fake_runtime: Opened, saved: Path) -> None:
    stayed, came_back = fake_runtime("One.", "Two."), fake_runtime("One.", "Two.")
    chat(stayed, TURNS)
    loaded = came_back.session.load(saved)
    assert list(loaded.messages) == SAID and loaded.model == "fake"
    assert loaded.num_tokens == came_back.fake.num_tokens  # type: ignore[attr-defined]
    theirs, ours = chat(stayed, NEXT), chat(came_back, NEXT)
    assert ours.token_ids == theirs.token_ids and ours.text == "Two."
    assert ours.stats.reused_tokens == theirs.stats.reused_tokens == loaded.num_tokens
    assert came_back.ledger.components == stayed.ledger.components


def test_the_last_answer_is_kept_as_the_tokens_that_were_sampled(
    fake_runtime: Opened, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenised again, the answer is other tokens here: only those of the file can be reused."""
    runtime = fake_runtime("One.", "Two.")
    loaded = runtime.session.load(saved)
    tokenizer = runtime.fake.tokenizer  # type: ignore[attr-defined]
    encode = tokenizer.encode
    monkeypatch.setattr(
        tokenizer, "encode", lambda text, **how: [65 if i == 79 else i for i in encode(text, **how)]
    )
    assert chat(runtime, NEXT).stats.reused_tokens == loaded.num_tokens


def test_without_messages_and_without_a_template(tmp_path: Path) -> None:
    def opened() -> Runtime:
        model = FakeModel(("One.",))
        model.spec = replace(model.spec, chat_template=None)
        return Runtime.open(model, memory="8GiB")

    runtime = opened()
    runtime.generate("Hi", temperature=0, max_tokens=2)
    runtime.session.save(str(tmp_path / "talk"))
    other = opened()
    assert other.session.load(str(tmp_path / "talk")).messages == ()
    again = other.generate("Hi", temperature=0, max_tokens=2)
    assert again.stats.reused_tokens == again.stats.prompt_tokens - 1


def test_transcripts_without_state_load_as_messages(fake_runtime: Opened, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    Transcript(model="somebody", messages=tuple(SAID)).save(path)
    runtime = fake_runtime("One.", "Two.")
    loaded = runtime.session.load(path)
    assert (list(loaded.messages), loaded.model, loaded.num_tokens) == (SAID, "somebody", 0)
    assert chat(runtime, NEXT).text == "Two."


def test_a_model_that_keeps_no_state_saves_its_messages(
    fake_runtime: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeModel, "supports_snapshot", False)
    runtime = fake_runtime("One.")
    chat(runtime, TURNS)
    assert runtime.session.save(tmp_path / "talk", SAID).num_tokens == 0
    assert Transcript.load(tmp_path / "talk").messages == tuple(SAID)


def test_saving_inside_an_answer_leaves_it_whole(fake_runtime: Opened, tmp_path: Path) -> None:
    runtime = fake_runtime("A long answer.")
    pieces = runtime.chat(TURNS, temperature=0)
    first = list(itertools.islice(pieces, 3))
    saved = runtime.session.save(tmp_path / "talk", TURNS)
    assert "".join(p.text for p in [*first, *pieces]) == "A long answer."
    other = fake_runtime("A long answer.")
    assert other.session.load(tmp_path / "talk").num_tokens == saved.num_tokens
    assert chat(other, TURNS).text == "A long answer."


def test_loading_ends_the_answer_that_is_being_read(fake_runtime: Opened, saved: Path) -> None:
    runtime = fake_runtime("One.", "Two.")
    pieces = runtime.chat([{"role": "user", "content": "another talk"}])
    next(pieces)
    num_tokens = runtime.session.load(saved).num_tokens
    with pytest.raises(RuntimeUnusable, match="another answer"):
        next(pieces)
    assert chat(runtime, NEXT).stats.reused_tokens == num_tokens


def test_an_interrupted_pass_is_not_saved(
    fake_runtime: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = fake_runtime("One.", "Two.")
    chat(runtime, TURNS)
    runtime.fake.forward([1, 2, 3])  # type: ignore[attr-defined]
    saved = runtime.session.save(tmp_path / "talk", SAID)
    other = fake_runtime("One.", "Two.")
    assert other.session.load(tmp_path / "talk").num_tokens == saved.num_tokens
    assert chat(other, NEXT).stats.reused_tokens == saved.num_tokens


def test_what_does_not_fit_the_budget_is_refused(
    fake_runtime: Opened, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = fake_runtime("One.", "Two.")
    chat(runtime, TURNS)
    before = dict(runtime.ledger.components)
    monkeypatch.setattr(module, "session_bytes", lambda *_: 1 << 40)
    for refused in (runtime.session.load, runtime.session.save, runtime.session.read_messages):
        with pytest.raises(OverBudget, match="session file"):
            refused(saved)
    assert runtime.ledger.components == before
    assert chat(runtime, NEXT).stats.reused_tokens > len("One.")


def test_at_the_lower_bound_a_session_is_saved_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan has no byte to spare: what a file takes comes out of the idle prompt's row."""
    # What other tests of this process have taken is not the matter.
    small = replace(read_process_memory(), resident_bytes=50 * MIB, peak_bytes=50 * MIB)
    for user in ("planning", "measured_baseline", "loaded_model"):
        monkeypatch.setattr(f"lowtide.runtime.{user}.read_process_memory", lambda: small)
    model = FakeModel(("One.", "Two."))
    bound = Runtime.open(model, memory="8GiB").plan.lower_bound_bytes
    runtime = Runtime.open(model, memory=bound)
    assert runtime.ledger.reserved_bytes == bound
    chat(runtime, TURNS)
    num_tokens = runtime.session.save(tmp_path / "talk", SAID).num_tokens
    assert runtime.session.load(tmp_path / "talk").num_tokens == num_tokens > 0


def test_wrong_use_is_a_sentence(fake_runtime: Opened, tmp_path: Path, saved: Path) -> None:
    runtime = fake_runtime()
    chat(runtime, TURNS)
    with pytest.raises(TemplateError, match="role 'king'"):
        runtime.session.save(tmp_path / "x", [{"role": "king", "content": ""}])
    with pytest.raises(TranscriptError, match="was not saved"):
        runtime.session.save(tmp_path / "no" / "where")
    with pytest.raises(TranscriptError, match="cannot be read: No such file"):
        runtime.session.load(tmp_path / "none")
    runtime.close()
    for closed in (runtime.session.save, runtime.session.load):
        with pytest.raises(RuntimeUnusable, match="closed"):
            closed(saved)


class Stateless(FakeModel):
    """A model of a user's own, which has the four methods alone."""

    supports_snapshot = False
    snapshot_component = FakeModel.__mro__[1].snapshot_component  # type: ignore[attr-defined]
    save_kv = FakeModel.__mro__[1].save_kv  # type: ignore[attr-defined]
    load_kv = FakeModel.__mro__[1].load_kv  # type: ignore[attr-defined]


def test_a_model_of_ones_own_need_not_keep_state(saved: Path) -> None:
    runtime = Runtime.open(Stateless(), memory="8GiB")
    with pytest.raises(LowtideError):
        runtime.session.load(saved)
    assert list(runtime.session.read_messages(saved)) == SAID
