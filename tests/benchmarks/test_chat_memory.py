"""A chat of 20 short turns with a context of 8,192, compared with llama-cpp-python's defaults.

Each runs in its own process. Compares the memory of generation: the peak resident set without the size of
the weights' file and without an empty Python process. Run with `make bench`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import run_python

pytestmark = pytest.mark.benchmark
NUM_TURNS = 20
NUM_TOKENS = 24

_TALK = """
import json
def talk(answer):
    messages = []
    for turn in range({turns}):
        messages.append({{"role": "user", "content": f"Say line {{turn}} of the list: box {{turn}}."}})
        messages.append({{"role": "assistant", "content": answer(messages)}})
    print(json.dumps([m["content"] for m in messages[1::2]]))
"""
_LOWTIDE = """
from lowtide import Runtime
with Runtime.open({model!r}, context=8192, threads=2) as runtime:
    def answer(messages):
        return "".join(p.text for p in runtime.chat(messages, max_tokens={tokens}, temperature=0))
    talk(answer)
"""
_LLAMA_CPP_PYTHON = """
from llama_cpp import Llama
llama = Llama({model!r}, n_ctx=8192, n_threads=2, n_threads_batch=2, verbose=False)
def answer(messages):
    completion = llama.create_chat_completion(
        messages, max_tokens={tokens}, temperature=0, repeat_penalty=1.0
    )
    return completion["choices"][0]["message"]["content"]
talk(answer)
"""


def test_generation_memory_of_a_chat(benchmark: Any, smollm2: Path) -> None:
    values = {"model": str(smollm2), "turns": NUM_TURNS, "tokens": NUM_TOKENS}
    found: dict[str, tuple[int, list[str]]] = {}

    def talk() -> None:
        bare = run_python("pass").peak_bytes
        for name, code in (("lowtide", _LOWTIDE), ("llama-cpp-python", _LLAMA_CPP_PYTHON)):
            done = run_python((_TALK + code).format(**values), timeout=600)
            assert done.code == 0, done.stderr
            num_bytes = done.peak_bytes - bare - smollm2.stat().st_size
            found[name] = num_bytes, json.loads(done.stdout)

    benchmark.pedantic(talk, rounds=1)
    (lowtide, answers), (peer, peer_answers) = found["lowtide"], found["llama-cpp-python"]
    same = sum(a.strip() == b.strip() for a, b in zip(answers, peer_answers, strict=True))
    benchmark.extra_info.update(saved=1 - lowtide / peer, same_answers=same)
    print(
        f"\na chat of {NUM_TURNS} turns: {lowtide / 2**20:.1f} MiB without weights and interpreter, "
        f"llama-cpp-python {peer / 2**20:.1f} MiB: {1 - lowtide / peer:.1%} less; {same} equal answers"
    )
    assert lowtide < 0.3 * peer
