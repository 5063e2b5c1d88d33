"""Saved sessions of ONNX models, with their own and with lowtide's attention: exact and inside the plan."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from onnx_decoders import Shape, write_decoder
from processes import run_lowtide, run_python
from recorded import recorded_logits

from lowtide import GenerationResult, Runtime, Tidal
from lowtide.models.fake_model import CHAT_TEMPLATE
from lowtide.runtime.errors import SnapshotMismatch, TranscriptError

QUESTION = "Tell me about the sea. " * 4
TALK = [{"role": "user", "content": QUESTION}]
WIDE = Shape(layers=8, width=512, heads=8, kv_heads=8, feed_forward=64, context=4096)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    shape = Shape(layers=4, kv_heads=2, context=1024)
    return write_decoder(tmp_path / "tiny", "gqa", shape, chat_template=CHAT_TEMPLATE)


def _answer(runtime: Runtime, *texts: str) -> GenerationResult:
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return GenerationResult.of(runtime.chat(messages, temperature=0, max_tokens=8))


def _next_turn(runtime: Runtime, answer: str) -> tuple[GenerationResult, list[bytes]]:
    with recorded_logits(runtime) as logits:
        result = _answer(runtime, QUESTION, answer, "And of the tide?")
    return result, logits


@pytest.mark.parametrize(
    ("attention", "kv_type"),
    [
        ("llama", None),
        ("dense", "f16"),
        ("dense", "f32"),
        (Tidal(k=80, selection_layers=(1,), correction=5), None),
        ("delta:sparsity=0.5,window=20", None),
        ("delta:granularity=element,sparsity=0.5,window=20", "f32"),
    ],
)
def test_continuing_is_the_same_bit_for_bit(
    tiny: Path, tmp_path: Path, attention: str | Tidal, kv_type: str | None
) -> None:
    path = tmp_path / "talk"
    options = {"memory": "2GiB", "threads": 2, "attention": attention, "kv_type": kv_type}
    with Runtime.open(tiny, context=512, **options) as original:  # type: ignore[arg-type]
        answer = _answer(original, QUESTION).text
        saved = original.saved_chats.save(path)
        expected, logits = _next_turn(original, answer)
    with Runtime.open(tiny, context=1024, **options) as restored:  # type: ignore[arg-type]
        restored.generate("word " * 30, max_tokens=3)  # earlier tokens leave no trace
        assert restored.saved_chats.load(path).num_tokens == saved.num_tokens > 60
        result, same_logits = _next_turn(restored, answer)
    assert result.token_ids == expected.token_ids
    assert result.stats.reused_tokens == expected.stats.reused_tokens > 60
    assert same_logits == logits


def test_a_snapshot_is_refused_by_other_models_and_settings(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk"
    options = {"memory": "2GiB", "threads": 1, "attention": "dense"}
    with Runtime.open(tiny, **options) as runtime:  # type: ignore[arg-type]
        runtime.generate("word " * 110, max_tokens=2)
        runtime.saved_chats.save(path, TALK)
    other_model = write_decoder(tmp_path / "other", "gqa", Shape(layers=4, kv_heads=4))
    others = {
        "with the KV type f16, but the KV type is f32 now": {**options, "kv_type": "f32"},
        "with the attention dense, but the attention is Tidal": {
            **options,
            "attention": "tidal:layers=1",
        },
        "with the KV type f16, but the KV type is f32 now; ": {**options, "attention": "llama"},
        "tokens but the context holds 512; raise context": {**options, "context": 512},
        "with the model tiny": {**options, "model": other_model},
    }
    for sentence, other in others.items():
        with (
            Runtime.open(other.pop("model", tiny), **other) as runtime,  # type: ignore[arg-type]
            pytest.raises(SnapshotMismatch, match=sentence),
        ):
            runtime.saved_chats.load(path)


def test_any_damaged_byte_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk"
    with Runtime.open(tiny, memory="2GiB", threads=1, attention="dense") as runtime:
        runtime.generate("Hi", max_tokens=2, temperature=0)
        runtime.saved_chats.save(path, TALK)
        whole = path.read_bytes()
        for at in [*range(24), *range(24, len(whole), 61)]:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(TranscriptError, match="talk"):
                runtime.saved_chats.load(path)
        path.write_bytes(whole)
        assert runtime.saved_chats.load(path).num_tokens > 0


@pytest.mark.parametrize("attention", ["llama", "dense"])
def test_saving_and_loading_stay_inside_the_reservation(tmp_path: Path, attention: str) -> None:
    folder = write_decoder(tmp_path / "wide", "gqa", WIDE)
    done = run_python(
        "from lowtide import Runtime\n"
        "from lowtide.memory.plan.estimates import session_bytes\n"
        "from lowtide.memory.process import read_process_memory as read\n"
        f"options = {{'memory': '2GiB', 'threads': 1, 'attention': {attention!r}}}\n"
        f"with Runtime.open({str(folder)!r}, **options) as runtime:\n"
        "    runtime._session.append([7])\n"
        f"    runtime.saved_chats.save({str(tmp_path / 'first')!r})\n"
        f"    runtime.saved_chats.load({str(tmp_path / 'first')!r})  # code that is read in is no state\n"
        "    runtime._session.clear()\n"
        "    while len(runtime._session.token_ids) < 2048:\n"
        "        runtime._session.append([7] * runtime._model.batch_size)\n"
        "    before = read().peak_bytes\n"
        f"    path = {str(tmp_path / 'talk')!r}\n"
        "    saved = runtime.saved_chats.save(path)\n"
        "    loaded = runtime.saved_chats.load(path)\n"
        "    reserved = session_bytes(runtime.spec, 2048, runtime.plan.kv_type, 1000)\n"
        "    print(saved.num_bytes, loaded.num_tokens, reserved, before, read().peak_bytes)\n"
    )
    assert done.code == 0, done.stderr
    num_bytes, num_tokens, reserved, before, after = map(int, done.stdout.split())
    assert num_tokens == 2048 and num_bytes > 7 * reserved
    assert after - before <= reserved


@pytest.mark.parametrize("attention", ["llama", "dense"])
def test_a_chat_continues_in_another_process(tiny: Path, tmp_path: Path, attention: str) -> None:
    path = tmp_path / "talk"
    options = ("chat", str(tiny), "--attention", attention, "--temp", "0", "-n", "8", "-t", "1")
    turns = ("My name is Ada.", "What is my name?")
    whole = run_lowtide(*options, stdin="\n".join(turns).encode())
    first = run_lowtide(*options, stdin=f"{turns[0]}\n/save {path}\n".encode())
    second = run_lowtide(*options, stdin=f"/load {path}\n{turns[1]}\n".encode())
    assert (whole.code, first.code, second.code) == (0, 0, 0), second.stderr
    assert first.stdout + second.stdout == whole.stdout
    assert "tokens restored to the KV cache" in second.stderr
