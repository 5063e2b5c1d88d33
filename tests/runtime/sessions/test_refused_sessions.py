"""Chat files that are damaged, of another model, or forged: refused, and nothing else changes."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_files import write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saved_talk import MESSAGES, NEXT, TURNS, chat

from lowtide import FakeModel, Runtime
from lowtide.models.errors import SnapshotError
from lowtide.models.gguf.llama_cpp import llama_library
from lowtide.runtime.errors import SnapshotMismatch, TranscriptError
from lowtide.runtime.sessions.file import open_chat, write_chat

Opened = Callable[..., Runtime]


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
)
@given(data=st.data())
def test_any_damaged_byte_is_refused_and_changes_nothing(
    fake_runtime: Opened, saved: Path, data: st.DataObject
) -> None:
    whole = saved.read_bytes()
    damaged = bytearray(whole)
    damaged[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    saved.write_bytes(damaged)
    runtime = fake_runtime("One.", "Two.")
    chat(runtime, TURNS)
    held = list(runtime._session.token_ids)
    try:
        for refused in (runtime.saved_chats.load, runtime.saved_chats.read_messages):
            with pytest.raises(TranscriptError, match="talk"):
                refused(saved)
    finally:
        saved.write_bytes(whole)
    assert runtime._session.token_ids == held
    assert chat(runtime, NEXT).stats.reused_tokens == len(held)


class Other(FakeModel):
    def snapshot_properties(self) -> dict[str, str]:
        return {"model": "another"}


def _other_model() -> Runtime:
    return Runtime.open(Other(), memory="8GiB")


def _short_context() -> Runtime:
    return Runtime.open(FakeModel(context=16), memory="8GiB")


def _other_attention() -> Runtime:
    runtime = Runtime.open(FakeModel(), memory="8GiB")
    runtime._engine.planned = replace(runtime.planned, policy=runtime.planned.policy.__class__())
    runtime._engine.planned.policy.name = "sparse"  # type: ignore[misc]
    return runtime


MISMATCHES = {
    "the model fake, but the model is another now": _other_model,
    "tokens but the context holds 16": _short_context,
    "the attention llama, but the attention is sparse now": _other_attention,
}


@pytest.mark.parametrize("sentence", MISMATCHES)
def test_the_snapshot_of_another_model_is_refused_and_its_messages_are_not(
    sentence: str, saved: Path
) -> None:
    runtime = MISMATCHES[sentence]()
    with pytest.raises(SnapshotMismatch, match=sentence) as caught:
        runtime.saved_chats.load(saved)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert runtime._session.token_ids == []
    assert list(runtime.saved_chats.read_messages(saved)) == MESSAGES


def test_a_snapshot_that_native_code_refuses_leaves_an_empty_cache(
    fake_runtime: Opened, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FakeModel, path: Path, num_bytes: int, num_tokens: int) -> list[int]:
        self._tokens = [1, 2, 3]
        raise SnapshotError("no room")

    runtime = fake_runtime("One.", "Two.")
    chat(runtime, TURNS)
    monkeypatch.setattr(FakeModel, "load_kv", refuse)
    with pytest.raises(TranscriptError, match=r"cannot be read \(no room\)"):
        runtime.saved_chats.load(saved)
    answer = chat(runtime, NEXT)
    assert (answer.text, answer.stats.reused_tokens) == ("Two.", 0)


def test_a_file_that_changes_while_it_is_read_is_refused(
    fake_runtime: Opened, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_kv = FakeModel.load_kv

    def changed(self: FakeModel, path: Path, num_bytes: int, num_tokens: int) -> list[int]:
        os.utime(saved, ns=(1, 1))
        return load_kv(self, path, num_bytes, num_tokens)

    monkeypatch.setattr(FakeModel, "load_kv", changed)
    runtime = fake_runtime("One.", "Two.")
    with pytest.raises(TranscriptError, match="was changed while it was read"):
        runtime.saved_chats.load(saved)
    assert runtime._session.token_ids == [] and runtime.fake.num_tokens == 0  # type: ignore[attr-defined]


FORGED = {
    "no properties": {"properties": None},
    "no numbers": {"num_tokens": "many"},
    "no last answer": {"last": []},
    "other tokens": {"num_tokens": 4},
    "no messages": {"messages": [{"role": "user", "content": 5}]},
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_values_are_refused_even_with_a_right_checksum(
    name: str, fake_runtime: Opened, tmp_path: Path
) -> None:
    header = {
        "properties": {"model": "fake", "attention": "llama"},
        "num_tokens": 3,
        "exact_until": 3,
        "last": {"text": "", "token_ids": [], "num_messages": 0},
        "model": "fake",
        "messages": MESSAGES,
    }
    snapshot = b"fake" + array("i", [1, 2, 3]).tobytes()
    path = tmp_path / "talk"
    runtime = fake_runtime()
    write_chat(path, lambda at: at.write_bytes(snapshot), header)
    assert runtime.saved_chats.load(path).num_tokens == 3
    write_chat(path, lambda at: at.write_bytes(snapshot), {**header, **FORGED[name]})
    with pytest.raises(TranscriptError, match="talk has") as caught:
        runtime.saved_chats.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_tokens", [-1, 0, 1, 400])
def test_a_forged_count_is_refused_before_llama_cpp_reads_the_state(
    num_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head's count is what the ledger was asked for."""
    path = tmp_path / "talk"
    model = write_model(tmp_path / "random.gguf", width=128)
    with Runtime.open(model, memory="4GiB", context=512, threads=1) as runtime:
        runtime.generate("The tide comes in.", temperature=0, max_tokens=2)
        num_held = runtime.saved_chats.save(path).num_tokens
        with open_chat(path) as file:
            assert file is not None
            header, snapshot = file.header(), path.read_bytes()[: file.num_snapshot_bytes]
        assert runtime.saved_chats.load(path).num_tokens == num_held > 1
        write_chat(path, lambda at: at.write_bytes(snapshot), {**header, "num_tokens": num_tokens})
        monkeypatch.delattr(llama_library().api, "llama_state_seq_load_file")
        sentence = f"it holds {num_held} tokens instead of {num_tokens}"
        with pytest.raises(TranscriptError, match=sentence) as caught:
            runtime.saved_chats.load(path)
        assert "\n" not in str(caught.value) and runtime.saved_chats.read_messages(path) == ()
        assert runtime.generate("The tide", temperature=0, max_tokens=2).stats.reused_tokens == 0
