"""Load for a machine: processes that only compute, and another llama.cpp that decodes with spinning threads."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parent
_COMPUTE = "x = 1\nwhile True:\n    x = x * 3 & 0xFFFFFFFF\n"
_DECODE = """
import sys, time
from pathlib import Path
from peer import Peer
peer = Peer(Path(sys.argv[1]), context=512, batch_size=64, threads=int(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
peer.prefill(list(range(100, 164)))
print("decoding", flush=True)
started, tokens = time.perf_counter(), 0
while time.perf_counter() - started < float(sys.argv[3]):
    peer.api.llama_memory_seq_rm(peer.memory, 0, 63, -1)
    peer._decode([1])
    tokens += len(peer.decode(16))
print(tokens / (time.perf_counter() - started), flush=True)
sys.stdin.readline()
"""
_GAPS = """
import sys, time
end, last, gaps = time.perf_counter() + float(sys.argv[1]), time.perf_counter(), []
while last < end:
    now = time.perf_counter()
    if now - last > 1e-4:
        gaps.append(now - last)
    last = now
print(sum(gaps), max(gaps, default=0.0))
"""


@contextlib.contextmanager
def computing(count: int) -> Iterator[None]:
    """Run `count` processes that only compute; they are on their way when the block begins."""
    processes = [subprocess.Popen([sys.executable, "-S", "-c", _COMPUTE]) for _ in range(count)]
    try:
        time.sleep(0.3 if count else 0.0)
        yield
    finally:
        _end(processes)


@contextlib.contextmanager
def decoding_llama(
    model: Path, threads: int = 2, seconds: float = 600.0
) -> Iterator[subprocess.Popen[str]]:
    """Run another llama.cpp, with its settings as they are, that decodes for `seconds`; it then writes its tokens/s."""
    process = _python(_DECODE, str(model), str(threads), str(seconds))
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline().strip() == "ready"
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == "decoding"
        yield process
    finally:
        _end([process])


@contextlib.contextmanager
def prepared(worker: str, request: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """Start `worker`, a program of this folder, and wait until its model is open."""
    process = subprocess.Popen(
        [sys.executable, str(SUPPORT / worker), json.dumps(request)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline().strip() == "ready"
        yield process
    finally:
        _end([process])


def begin(process: subprocess.Popen[str]) -> None:
    """Let a prepared worker begin."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for what the worker measured."""
    assert process.stdout is not None
    found: dict[str, Any] = json.loads(process.stdout.readline())
    return found


def lost_time(seconds: float = 0.5) -> tuple[float, float]:
    """Return the share of its time that a process alone on each core loses to the machine, and its longest pause."""
    processes = [_python(_GAPS, str(seconds)) for _ in range(2)]
    texts = [process.communicate()[0].split() for process in processes]
    lost = [float(total) / seconds for total, _ in texts]
    return max(lost), max(float(longest) for _, longest in texts)


def _python(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=SUPPORT,
    )


def _end(processes: list[subprocess.Popen[Any]] | list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
