"""Saved chats of real models: the same bits, the same memory, and no kill that loses a file."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gguf_files import write_model
from processes import run_lowtide, run_python
from recorded import recorded_logits

from lowtide import GenerationResult, Runtime, Tidal
from lowtide.memory.os.kv_pages import can_use_demand_zero
from lowtide.memory.units import MIB
from lowtide.runtime.errors import SnapshotMismatch, TranscriptError

pytestmark = pytest.mark.real

QUESTION = "Tell me about the sea. " * 12
CHAT = [{"role": "user", "content": QUESTION}]
LONG = "word " * 150


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small weights and a large cache, 16 KiB a token: a long chat takes little time."""
    path = tmp_path_factory.mktemp("model") / "wide.gguf"
    return write_model(
        path, layers=8, width=512, heads=8, kv_heads=8, feed_forward=64, context=4096
    )


def _answer(runtime: Runtime, *texts: str) -> GenerationResult:
    """What follows the texts of a conversation; as one text where the model has no template."""
    if runtime.spec.chat_template is None:
        return runtime.generate(" ".join(texts), temperature=0, max_tokens=8)
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return GenerationResult.of(runtime.chat(messages, temperature=0, max_tokens=8))


def _next_turn(runtime: Runtime, answer: str) -> tuple[GenerationResult, list[bytes]]:
    with recorded_logits(runtime) as logits:
        result = _answer(runtime, QUESTION, answer, "And of the tide?")
    return result, logits


CASES = [
    ("smollm2", "f16", "llama"),
    ("smollm2", "f16", Tidal(k=69, correction=5)),
    ("smollm2", "q8_0", "llama"),
    ("smollm2", "q4_0", "dense"),
    ("gemma3-270m", "f16", "llama"),
    ("gemma3-270m", "q8_0", "dense"),
]


@pytest.mark.parametrize(("model", "kv_type", "attention"), CASES)
def test_going_on_is_the_same_bit_for_bit(
    model: str, kv_type: str, attention: str | Tidal, tmp_path: Path
) -> None:
    path = tmp_path / "talk"
    options = {
        "memory": "4GiB",
        "context": 1024,
        "kv_type": kv_type,
        "attention": attention,
        "threads": 2,
    }
    with Runtime.open(model, **options) as stayed:  # type: ignore[arg-type]
        answer = _answer(stayed, QUESTION).text
        saved = stayed.saved_chats.save(path)
        expected, logits = _next_turn(stayed, answer)
    with Runtime.open(model, **{**options, "context": 2048}) as reloaded:  # type: ignore[arg-type]
        reloaded.generate(LONG, max_tokens=3)  # an earlier prompt leaves no trace
        assert reloaded.saved_chats.load(path).num_tokens == saved.num_tokens > 60
        result, same_logits = _next_turn(reloaded, answer)
    assert result.token_ids == expected.token_ids
    assert result.stats.reused_tokens == expected.stats.reused_tokens > 60
    assert same_logits == logits


def test_a_snapshot_is_refused_by_other_models_and_settings(smollm2: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk"
    options = {"memory": "4GiB", "context": 1024, "attention": "llama"}
    with Runtime.open(smollm2, **options) as runtime:  # type: ignore[arg-type]
        runtime.generate("word " * 520, max_tokens=2)
        runtime.saved_chats.save(path, CHAT)
    others = {
        "with the KV type f16, but the KV type is q8_0 now": {**options, "kv_type": "q8_0"},
        "with the attention llama, but the attention is dense now": {
            **options,
            "attention": "dense",
        },
        "tokens but the context holds 512; raise context": {**options, "context": 512},
        "with the model Smollm2": {**options, "model": "gemma3-270m"},
    }
    for sentence, other in others.items():
        with (
            Runtime.open(other.pop("model", smollm2), **other) as runtime,  # type: ignore[arg-type]
            pytest.raises(SnapshotMismatch, match=sentence),
        ):
            runtime.saved_chats.load(path)


def test_any_damaged_byte_of_a_real_file_is_refused(real_runtime: Runtime, tmp_path: Path) -> None:
    """Bytes all through the file, and every byte at its two ends."""
    path = tmp_path / "talk"
    real_runtime.generate("Hi", max_tokens=2, temperature=0)
    real_runtime.saved_chats.save(path, CHAT)
    size = path.stat().st_size
    positions = [*range(64), *range(64, size - 600, size // 50), *range(size - 600, size, 7)]
    for at in positions:
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(TranscriptError, match="talk"):
            real_runtime.saved_chats.load(path)
        with path.open("r+b") as file:
            file.seek(at)
            file.write(byte)
    assert real_runtime.saved_chats.load(path).num_tokens > 0


def test_a_few_tokens_touch_a_few_pages(smollm2: Path, tmp_path: Path) -> None:
    """Of a cache of 180 MiB: saving and loading go by the tokens in use."""
    if not can_use_demand_zero():
        pytest.skip("this system cannot leave a cache untouched")
    done = run_python(
        "from lowtide import Runtime\n"
        "from lowtide.memory.process import read_process_memory as read\n"
        f"with Runtime.open({str(smollm2)!r}, memory='1GiB', context=8192) as runtime:\n"
        "    runtime.generate('word ' * 100, max_tokens=4)\n"
        "    before = read().peak_bytes\n"
        f"    path = {str(tmp_path / 'talk')!r}\n"
        "    saved = runtime.saved_chats.save(path)\n"
        "    after_save = read().peak_bytes\n"
        "    runtime._session.truncate_to_prefix(())\n"
        "    loaded = runtime.saved_chats.load(path)\n"
        "    runtime.generate('word ' * 110, max_tokens=4)\n"
        "    print(saved.num_tokens, loaded.num_tokens, before, after_save, read().peak_bytes)\n"
    )
    assert done.code == 0, done.stderr
    saved, loaded, before, after_save, after_load = map(int, done.stdout.split())
    assert saved == loaded > 100
    assert after_save - before < 2 * MIB
    assert after_load - before < 4 * MIB


def test_a_plan_without_a_byte_to_spare_saves_and_loads(smollm2: Path, tmp_path: Path) -> None:
    """Of a cache that is hardly used, and of one that is used by half."""
    path = tmp_path / "talk"
    with Runtime.open(smollm2, memory="2GiB", context=4096) as runtime:
        ledger = runtime.ledger
        ledger.reserve("all that is left", ledger.budget_bytes - ledger.reserved_bytes)
        for num_tokens in (64, 2048):
            while len(runtime._session.token_ids) < num_tokens:
                runtime._session.append([7] * min(64, runtime._model.batch_size))
            assert runtime.saved_chats.save(path).num_tokens == num_tokens
            assert runtime.saved_chats.load(path).num_tokens == num_tokens


def test_the_peak_of_saving_and_loading_is_what_is_reserved(
    wide_model: Path, tmp_path: Path
) -> None:
    """A copy of the whole snapshot would be sixteen times as much."""
    done = run_python(
        "from lowtide import Runtime\n"
        "from lowtide.memory.plan.estimates import session_bytes\n"
        "from lowtide.memory.process import read_process_memory as read\n"
        f"with Runtime.open({str(wide_model)!r}, memory='2GiB', context=4096, threads=1) as runtime:\n"
        f"    runtime.saved_chats.save({str(tmp_path / 'first')!r}, state=False)\n"
        "    while len(runtime._session.token_ids) < 3968:\n"
        "        runtime._session.append([7] * runtime._model.batch_size)\n"
        "    before = read().peak_bytes\n"
        f"    path = {str(tmp_path / 'talk')!r}\n"
        "    saved = runtime.saved_chats.save(path)\n"
        "    loaded = runtime.saved_chats.load(path)\n"
        "    reserved = session_bytes(runtime.spec, 4096, 'f16', 1000)\n"
        "    print(saved.num_bytes, loaded.num_tokens, reserved, before, read().peak_bytes)\n"
    )
    assert done.code == 0, done.stderr
    num_bytes, num_tokens, reserved, before, after = map(int, done.stdout.split())
    assert num_tokens == 3968 and num_bytes > 7 * reserved
    assert after - before <= reserved


_SAVE_OVER_AND_OVER = """
import sys
from lowtide import Runtime
with Runtime.open(sys.argv[1], memory='2GiB', context=4096, threads=1) as runtime:
    while len(runtime._session.token_ids) < 1024:
        runtime._session.append([7] * runtime._model.batch_size)
    runtime.saved_chats.save(sys.argv[2], [{'role': 'user', 'content': 'old'}])
    print('saved', flush=True)
    while True:
        runtime.saved_chats.save(sys.argv[2], [{'role': 'user', 'content': 'new'}])
"""


def test_a_kill_during_a_save_leaves_a_whole_file(wide_model: Path, tmp_path: Path) -> None:
    killed_inside = 0
    with Runtime.open(wide_model, memory="2GiB", context=4096) as runtime:
        for attempt in range(6):
            folder = tmp_path / str(attempt)
            folder.mkdir()
            path = folder / "talk"
            process = subprocess.Popen(
                [sys.executable, "-c", _SAVE_OVER_AND_OVER, str(wide_model), str(path)],
                stdout=subprocess.PIPE,
            )
            assert process.stdout is not None and process.stdout.readline() == b"saved\n"
            while len(os.listdir(folder)) < 2:  # a save is under way
                assert process.poll() is None
                time.sleep(0.0005)
            time.sleep(0.002 * attempt)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            process.stdout.close()
            killed_inside += len(os.listdir(folder)) == 2
            loaded = runtime.saved_chats.load(path)
            assert loaded.num_tokens == 1024
            assert loaded.messages[0]["content"] in ("old", "new")
    assert killed_inside >= 1


def test_a_chat_goes_on_in_another_process(smollm2: Path, tmp_path: Path) -> None:
    """As a user does it, in a budget at the lower bound."""
    path = tmp_path / "talk"
    options = ("chat", str(smollm2), "--memory", "180MiB", "--temp", "0", "-n", "12")
    turns = ("My name is Ada.", "What is my name?")
    whole = run_lowtide(*options, stdin="\n".join(turns).encode())
    first = run_lowtide(*options, stdin=f"{turns[0]}\n/save {path}\n".encode())
    second = run_lowtide(*options, stdin=f"/load {path}\n{turns[1]}\n".encode())
    assert (whole.code, first.code, second.code) == (0, 0, 0), second.stderr
    assert first.stdout + second.stdout == whole.stdout
    assert "tokens restored to the KV cache" in second.stderr
    assert max(first.peak_bytes, second.peak_bytes) <= 180 * MIB
