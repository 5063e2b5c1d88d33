"""Memory released on request: the resident set falls, and the next answer is the same."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import pytest
from processes import run_python

from lowtide import GenerationResult, Runtime
from lowtide.memory.reclaim import LEVELS, Reclaimer, reclaim
from lowtide.memory.units import MIB
from lowtide.models.errors import BadOption
from lowtide.runtime.errors import RuntimeUnusable

Opened = Callable[..., Runtime]
HELLO = [{"role": "user", "content": "Hello"}]


def test_a_level_includes_the_milder_ones_in_order() -> None:
    called: list[str] = []
    reclaimers = [
        Reclaimer(level, lambda name=level: called.append(name))  # type: ignore[misc]
        for level in ("complete", "background", "moderate")
    ]
    for level, expected in (
        ("background", ["background"]),
        ("moderate", ["background", "moderate"]),
        ("complete", ["complete", "background", "moderate"]),
    ):
        called.clear()
        assert reclaim(reclaimers, level).level == level
        assert called == expected
    with pytest.raises(
        BadOption, match="level is 'all'; it must be background, moderate or complete"
    ):
        reclaim(reclaimers, "all")


def test_freed_bytes_are_measured() -> None:
    """In a process of its own with a small heap."""
    done = run_python(
        "from lowtide.memory.reclaim import Reclaimer, reclaim\n"
        "blocks = [bytearray(b'x') * (48 << 20)]\n"
        "print(reclaim([Reclaimer('background', blocks.clear)], 'background').freed_bytes)\n"
        "print(reclaim([], 'complete').freed_bytes)"
    )
    freed, nothing = map(int, done.stdout.split())
    assert abs(freed - (48 << 20)) < MIB and nothing < MIB


def test_after_complete_the_next_prompt_is_computed_again(fake_runtime: Opened) -> None:
    runtime = fake_runtime("Hello.")
    first = GenerationResult.of(runtime.chat(HELLO, temperature=0))
    for level, reused in (("background", True), ("moderate", True), ("complete", False)):
        assert runtime.trim(level) >= 0
        again = GenerationResult.of(runtime.chat(HELLO, temperature=0))
        assert again.token_ids == first.token_ids
        assert (again.stats.reused_tokens > 0) is reused
    with pytest.raises(BadOption, match="level is 'most'"):
        runtime.trim("most")


def test_trimming_during_an_answer(fake_runtime: Opened) -> None:
    runtime = fake_runtime("Hello.")
    pieces = runtime.chat(HELLO, temperature=0)
    begin = next(pieces).text
    runtime.trim("moderate")
    assert begin + "".join(piece.text for piece in pieces) == "Hello."
    pieces = runtime.chat(HELLO, temperature=0)
    next(pieces)
    runtime.trim("complete")
    with pytest.raises(RuntimeUnusable, match="complete trim"):
        next(pieces)
    assert GenerationResult.of(runtime.chat(HELLO, temperature=0)).text == "Hello."


def test_a_closed_runtime_cannot_be_trimmed(fake_runtime: Opened) -> None:
    runtime = fake_runtime()
    runtime.close()
    for level in LEVELS:
        with pytest.raises(RuntimeUnusable, match="closed"):
            runtime.trim(level)


def test_another_thread_waits_for_the_running_pass(fake_runtime: Opened) -> None:
    """The pages behind the last token are being written while a pass runs."""
    runtime = fake_runtime("Hello.")
    model = runtime._model
    forward, trimmed = model.forward, threading.Event()

    def trimming() -> None:
        runtime.trim("background")
        trimmed.set()

    other = threading.Thread(target=trimming)

    def slow(token_ids):  # type: ignore[no-untyped-def]
        if other.ident is None:
            other.start()
            assert not trimmed.wait(0.2)
        return forward(token_ids)

    model.forward = slow  # type: ignore[method-assign]
    assert GenerationResult.of(runtime.chat(HELLO, temperature=0)).text == "Hello."
    assert trimmed.wait(10)
    other.join()


REAL = """
import json
from lowtide import GenerationResult, Runtime
from lowtide.memory.process import read_process_memory as read
with Runtime.open("smollm2", memory="8GiB", context=8192, threads=1, attention={attention!r}) as runtime:
    history = [{{"role": "user", "content": "The tide is low. " * 90}}]
    def answer():
        result = GenerationResult.of(runtime.chat(history, temperature=0, max_tokens=12))
        return list(result.token_ids), result.stats.reused_tokens
    report = {{}}
    first, _ = answer()
    for level in ("background", "moderate", "complete"):
        before = read().resident_bytes
        freed = runtime.trim(level)
        report[level] = [freed, before - read().resident_bytes, *answer()]
    print(json.dumps([first, report]))
"""


@pytest.mark.real
@pytest.mark.parametrize("attention", ["llama", "tidal"])
def test_the_resident_set_falls_and_the_answer_is_the_same(attention: str) -> None:
    done = run_python(REAL.format(attention=attention))
    assert done.code == 0, done.stderr
    first, report = json.loads(done.stdout)
    for freed, fell, token_ids, _ in report.values():
        assert token_ids == first
        assert abs(freed - max(fell, 0)) < MIB
    assert (
        report["background"][3] > 400 and report["moderate"][3] > 400
    )  # the KV cache is still there
    assert report["complete"][3] == 0
    assert report["complete"][0] > 8 * MIB  # 470 tokens of 22.5 KiB


@pytest.mark.real
def test_free_heap_is_released() -> None:
    """Small freed blocks below one in use would otherwise stay in the C library's arena."""
    done = run_python(
        "from lowtide import Runtime\n"
        "with Runtime.open('smollm2', memory='8GiB', context=8192, threads=1) as runtime:\n"
        "    expected = runtime.generate('word', max_tokens=8, temperature=0).token_ids\n"
        "    import ctypes\n"
        "    malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free\n"
        "    malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]\n"
        "    blocks = [malloc(ctypes.c_size_t(1000)) for _ in range(8000)]\n"
        "    [ctypes.memset(block, 1, 1000) for block in blocks]\n"
        "    [free(block) for block in blocks[:-1]]\n"
        "    print(runtime.trim())\n"
        "    print(runtime.generate('word', max_tokens=8, temperature=0).token_ids == expected)"
    )
    assert done.code == 0, done.stderr
    freed, same = done.stdout.split()
    assert int(freed) > MIB // 2 and same == "True"
