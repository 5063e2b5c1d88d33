"""Runtimes that are used from several threads, closed beside an answer, dropped, and inherited by forked children."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from gguf_files import write_model
from onnx_decoders import write_decoder
from processes import Finished, run_python

from lowtide import Embedder, FakeModel, Runtime
from lowtide.models.fake_model import FakeSequences
from lowtide.models.model import SequenceBatch, SequenceSlice
from lowtide.runtime.errors import RuntimeUnusable


class SlowModel(FakeModel):
    """Computes each pass in 50 ms, and notices when it is freed meanwhile."""

    is_computing = False
    freed_during_pass = False

    def __init__(self, *replies: str) -> None:
        super().__init__(replies or ("A long answer of many words.",), context=512, batch_size=64)
        self.started = threading.Event()
        self.during_pass: Callable[[], None] = lambda: None

    def forward(self, token_ids: Sequence[int]) -> np.ndarray:  # type: ignore[type-arg]
        with self.slowly():
            return super().forward(token_ids)

    @contextlib.contextmanager
    def slowly(self) -> Iterator[None]:
        """Compute a pass inside the block."""
        self.is_computing = True
        self.started.set()
        self.during_pass()
        time.sleep(0.05)
        yield
        self.is_computing = False

    def open_sequences(
        self, num_sequences: int, num_slots: int, max_logits: int | None = None
    ) -> SequenceBatch:
        return SlowSequences(self, num_sequences, num_slots, max(max_logits or 0, num_sequences))

    def close(self) -> None:
        self.freed_during_pass |= self.is_computing
        super().close()


class SlowSequences(FakeSequences):
    """Sequences of a slow model, which notices their passes."""

    def __init__(
        self, model: SlowModel, num_sequences: int, num_slots: int, max_logits: int
    ) -> None:
        super().__init__(model, num_sequences, num_slots, max_logits)
        self._slowly = model.slowly

    def forward(self, slices: Sequence[SequenceSlice]) -> np.ndarray:  # type: ignore[type-arg]
        with self._slowly():
            return super().forward(slices)


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """Start `work`; its error is put into the list."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def run(code: str, path: Path, options: dict[str, object] | None = None) -> Finished:
    """Run a program that finds the model's path in PATH and options in OPTIONS."""
    done = run_python(f"PATH, OPTIONS = {str(path)!r}, {options or {}!r}\n{code}", timeout=120)
    assert done.code == 0, done.stderr
    return done


@pytest.mark.parametrize("kind", ["generate", "chat", "batch"])
def test_close_waits_for_the_pass_that_runs(kind: str) -> None:
    model = SlowModel()
    runtime = Runtime.open(model, memory="8GiB")
    work = {
        "generate": lambda: runtime.generate("a", temperature=0),
        "chat": lambda: list(runtime.chat([{"role": "user", "content": "a"}], temperature=0)),
        "batch": lambda: runtime.generate_batch(["a", "b"], temperature=0),
    }[kind]
    thread, errors = in_thread(work)
    assert model.started.wait(60)
    runtime.close()
    thread.join(60)
    assert not thread.is_alive() and not model.freed_during_pass
    assert [type(error) for error in errors] == [RuntimeUnusable]
    assert "closed" in str(errors[0])


def test_close_inside_a_pass_frees_the_model_after_it() -> None:
    """A signal handler runs on the thread that computes."""
    model = SlowModel()
    runtime = Runtime.open(model, memory="8GiB")
    model.during_pass = runtime.close
    with pytest.raises(RuntimeUnusable, match="closed"):
        runtime.generate("a", temperature=0)
    assert not model.freed_during_pass
    runtime.close()


def test_all_methods_from_many_threads(tmp_path: Path) -> None:
    """Each either answers or says that another answer ended it."""
    model = SlowModel()
    runtime = Runtime.open(model, memory="8GiB")
    turns = [{"role": "user", "content": "a"}]
    works: list[Callable[[], object]] = [
        lambda: runtime.generate("a", max_tokens=3),
        lambda: list(runtime.chat(turns, max_tokens=3)),
        lambda: runtime.generate_batch(["a", "b"], max_tokens=2),
        lambda: runtime.trim("complete"),
        lambda: runtime.saved_chats.save(tmp_path / "talk", turns),
        lambda: runtime.saved_chats.load(tmp_path / "talk"),
    ]
    runtime.saved_chats.save(tmp_path / "talk", turns)
    threads = [in_thread(work) for work in works * 2]
    for thread, errors in threads:
        thread.join(30)
        assert not thread.is_alive()
        assert all(isinstance(error, RuntimeUnusable) for error in errors), errors
    assert runtime.generate("a", max_tokens=3, temperature=0).text
    runtime.close()


@pytest.fixture
def closed_after_the_test() -> None:
    """Nobody holds the runtimes of these tests: dropping them is tested."""


def test_a_dropped_runtime_is_freed_with_a_warning() -> None:
    model = SlowModel()
    runtime = Runtime.open(model, memory="8GiB")
    chunks = runtime.chat([{"role": "user", "content": "a"}])
    next(chunks)
    alive = weakref.ref(runtime)
    del runtime, chunks
    with pytest.warns(ResourceWarning, match="was not closed"):
        gc.collect()
    assert alive() is None and not model.freed_during_pass


def test_a_dropped_embedder_is_freed_with_a_warning(tmp_path: Path) -> None:
    embedder = Embedder.open(write_model(tmp_path / "m.gguf"), memory="1GiB", threads=1)
    assert embedder.embed("word7").shape == (1, 64)
    alive = weakref.ref(embedder)
    del embedder
    with pytest.warns(ResourceWarning, match="an embedder of random was not closed"):
        gc.collect()
    assert alive() is None


def test_opening_frees_the_runtimes_that_were_dropped(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", context=4096)
    done = run(
        "import sys, warnings, psutil\n"
        "from lowtide import Runtime\n"
        "warnings.simplefilter('ignore', ResourceWarning)\n"
        "sizes = []\n"
        "for _ in range(12):\n"
        "    runtime = Runtime.open(PATH, memory='1GiB', context=4096)\n"
        "    runtime.generate('a', max_tokens=2)\n"
        "    sizes.append(psutil.Process().memory_info().rss)\n"
        "print(max(sizes) - sizes[2])\n",
        path,
    )
    assert int(done.stdout) < 8 << 20, done.stdout


FORKED = """
import os, sys, time
from lowtide import Runtime
from lowtide.runtime.errors import RuntimeUnusable

def answer(runtime):
    return runtime.generate("ab cd", max_tokens=4, temperature=0).text

def open_one():
    return Runtime.open(PATH, memory="2GiB", context=256, threads=2, **OPTIONS)

parent = open_one()
expected = answer(parent)
pid = os.fork()
if pid == 0:
    try:
        answer(parent)
        os._exit(3)
    except RuntimeUnusable as error:
        assert "forked" in str(error), error
    parent.close()
    with open_one() as own:
        os._exit(0 if answer(own) == expected else 4)
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended:
        break
    time.sleep(0.05)
else:
    os.kill(pid, 9)
    sys.exit("the child hangs")
assert status == 0, status
assert answer(parent) == expected
parent.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("gguf", {}),
        ("gguf", {"attention": "dense", "repack": True}),
        ("onnx", {}),
        ("onnx", {"attention": "dense"}),
    ],
)
def test_a_forked_child_is_refused_the_runtime_and_opens_its_own(
    tmp_path: Path, engine: str, options: dict[str, object]
) -> None:
    path = (
        write_model(tmp_path / "m.gguf")
        if engine == "gguf"
        else write_decoder(tmp_path / "onnx", "gqa")
    )
    run(FORKED, path, options)


def test_a_signal_handler_may_close(fake_runtime: Callable[..., Runtime]) -> None:
    runtime = fake_runtime("A long answer of many words.")
    previous = signal.signal(signal.SIGUSR1, lambda *_: runtime.close())
    try:
        with pytest.raises(RuntimeUnusable, match="closed"):
            for _ in runtime.chat([{"role": "user", "content": "a"}]):
                os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, previous)
