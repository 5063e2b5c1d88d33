"""Hours of a service in minutes: opens, chats, edits, batches, saves and closes, until the time is up.

`SOAK_SECONDS` says how long (30 minutes by default). Work comes from threads, from asyncio and from forked children,
under random budgets, beside a process that keeps a core busy. At the end resident memory, file descriptors and
threads must be what they were after the first rounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from gguf_files import write_model

from lowtide import LowtideError, OverBudget, Runtime
from lowtide.memory.units import MIB

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("SOAK_SECONDS", "1800"))
WARM_UP_SHARE = 0.2
"""After this share of the time the resources are counted first: caches and pools are full."""
MOST_GROWTH_BYTES = 24 * MIB
"""What the allocator may hold more of at the end; a leak of one model a round is far more."""
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
POLICIES = ("llama", "dense", "tidal:k=256", "delta")
WORDS = "tide moon sea salt boat harbour wind rope sail net".split()


class Worker:
    """Opens a runtime with random options, uses it in random ways, and closes it."""

    def __init__(self, models: list[Path], folder: Path, seed: int) -> None:
        self.models, self.folder = models, folder
        self.random = random.Random(seed)
        self.refusals = self.answers = 0

    def run(self) -> None:
        """One life of a runtime; a budget that is too small is refused, which is part of it."""
        options = {
            "memory": resident_bytes() + self.random.randrange(2, 200) * MIB,
            "attention": self.random.choice(POLICIES),
            "threads": self.random.choice((1, 2)),
            "prefix_cache": self.random.choice((0, "1MiB")),
            "speculate": self.random.choice(("off", "off", "ngram")),
        }
        try:
            runtime = Runtime.open(self.random.choice(self.models), context=512, **options)
        except OverBudget:
            self.refusals += 1
            return
        with runtime:
            for _ in range(self.random.randrange(1, 5)):
                with contextlib.suppress(OverBudget):
                    self.random.choice((self.chat, self.edit, self.batch, self.save, self.stop))(
                        runtime
                    )
                    self.answers += 1

    def text(self) -> str:
        return " ".join(self.random.choices(WORDS, k=self.random.randrange(1, 30)))

    def ask(self, runtime: Runtime, messages: list[dict[str, str]]) -> str:
        chunks = runtime.chat(messages, max_tokens=8, overflow="drop-oldest")
        return "".join(chunk.text for chunk in chunks)

    def chat(self, runtime: Runtime) -> None:
        messages: list[dict[str, str]] = []
        for _ in range(3):
            messages.append({"role": "user", "content": self.text()})
            messages.append({"role": "assistant", "content": self.ask(runtime, messages)})

    def edit(self, runtime: Runtime) -> None:
        first = {"role": "user", "content": self.text()}
        self.ask(runtime, [first])
        self.ask(runtime, [{**first, "content": first["content"] + " again"}])
        runtime.trim(self.random.choice(("background", "moderate", "complete")))
        self.ask(runtime, [first])

    def batch(self, runtime: Runtime) -> None:
        with contextlib.suppress(LowtideError):  # some policies run one sequence at a time
            runtime.generate_batch([self.text() for _ in range(3)], max_tokens=6)

    def save(self, runtime: Runtime) -> None:
        path = self.folder / f"{threading.get_ident()}.session"
        messages = [{"role": "user", "content": self.text()}]
        self.ask(runtime, messages)
        runtime.saved_chats.save(path, messages)
        runtime.saved_chats.load(path)
        self.ask(runtime, messages)
        path.unlink()

    def stop(self, runtime: Runtime) -> None:
        chunks = runtime.stream(self.text(), max_tokens=64)
        next(chunks)
        chunks.close()


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def in_threads(worker: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            worker()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def in_asyncio(worker: Callable[[], None]) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(None, worker) for _ in range(2)))

    asyncio.run(run())


def in_a_forked_child(worker: Callable[[], None]) -> None:
    child = multiprocessing.get_context("fork").Process(target=worker)
    child.start()
    child.join(timeout=300)
    assert child.exitcode == 0, f"the forked child ended with {child.exitcode}"
    child.close()


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def resources() -> tuple[int, int, int]:
    gc.collect()
    process = psutil.Process()
    return resident_bytes(), process.num_fds(), process.num_threads()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_long_life_leaks_nothing(tmp_path: Path) -> None:
    models = [
        write_model(tmp_path / "dense.gguf", chat_template=TEMPLATE),
        write_model(
            tmp_path / "wide.gguf", layers=4, width=128, feed_forward=512, chat_template=TEMPLATE
        ),
    ]
    seed = int(os.environ.get("SOAK_SEED", "0")) or random.randrange(1 << 30)
    worker = Worker(models, tmp_path, seed)
    kinds = (Worker.run, *(lambda w, way=way: way(w.run) for way in (in_threads, in_asyncio)))
    before: tuple[int, int, int] | None = None
    rounds = 0
    begin = time.monotonic()
    with busy_process():
        while time.monotonic() < begin + SECONDS or before is None:
            for kind in kinds:
                kind(worker)
            if rounds % 4 == 0:
                in_a_forked_child(worker.run)
            rounds += 1
            if before is None and time.monotonic() >= begin + SECONDS * WARM_UP_SHARE:
                before = resources()
    after = resources()
    summary = f"seed {seed}, {rounds} rounds, {worker.answers} uses, {worker.refusals} refusals"
    print(f"{summary}: {before} -> {after}")
    assert worker.answers > 0, summary
    assert after[0] <= before[0] + MOST_GROWTH_BYTES, (
        f"memory grew: {before} -> {after} ({summary})"
    )
    assert after[1:] == before[1:], f"descriptors or threads: {before} -> {after} ({summary})"
