"""Scheduler: the runtime's own thread, which computes submitted answers together, pass by pass."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from lowtide.runtime.batch.queue import QueueFigures, QueueMeter
from lowtide.runtime.batch.submission import Submission
from lowtide.runtime.batch.workplace import AskedPrompt, Workplace
from lowtide.runtime.errors import QueueFull, RuntimeUnusable
from lowtide.runtime.generation.chat import ChatPrompt
from lowtide.runtime.generation.result import GenerationChunk
from lowtide.runtime.generation.state import GenerationRequest

IDLE_S = 5.0
"""Seconds after which an idle thread looks whether its runtime is still there."""
_running: weakref.WeakSet[Scheduler] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_running.clear)  # a child has none of the threads


@dataclass(slots=True, eq=False)
class _Job:
    """A submitted answer on its way: encoded, computed, delivered."""

    asked: AskedPrompt
    submission: Submission
    request: GenerationRequest | None = None
    prompt: ChatPrompt | None = None
    began_at: float = 0.0
    token_ids: list[int] = field(default_factory=list)


class Scheduler:
    """Computes submitted answers on one thread, which starts with the first of them and ends with `close`.

    `workplace` has the loop that computes them. Prompts are encoded on a second thread where answers run together, so
    that a long text or a large schema stops nobody. At most `workplace.num_sequences + max_waiting` answers are there
    at once.
    """

    def __init__(self, workplace: Workplace, max_waiting: int) -> None:
        self._workplace = workplace
        self._max_waiting = max_waiting
        self._meter = QueueMeter()
        self._keys = itertools.count()
        self._jobs: dict[int, _Job] = {}
        self._encoding: deque[int] = deque()
        self._encoded: deque[int] = deque()
        self._cancelled: deque[int] = deque()
        self._work = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._is_closed = False

    @property
    def is_busy(self) -> bool:
        """Whether any answer waits or runs."""
        return bool(self._jobs)

    @property
    def figures(self) -> QueueFigures:
        """How busy the runtime is."""
        running = self._workplace.num_running
        waiting = max(len(self._jobs) - running, 0)
        sequences = self._workplace.num_sequences
        return QueueFigures(
            running=running,
            waiting=waiting,
            sequences=sequences,
            max_waiting=self._max_waiting,
            tokens_per_s=self._meter.tokens_per_s,
            retry_after_s=self._meter.retry_after_s(waiting, sequences),
        )

    def submit(self, asked: AskedPrompt) -> Submission:
        """Add an answer behind those that wait. Raises `QueueFull` and `RuntimeUnusable`."""
        figures = self.figures
        with self._work:
            if self._is_closed:
                raise RuntimeUnusable("the runtime is closed; open it again")
            if len(self._jobs) >= figures.sequences + self._max_waiting:
                raise QueueFull(figures.waiting, figures.retry_after_s)
            key = next(self._keys)
            submission = Submission(partial(self._cancel, key), asked.params.constraint)
            self._jobs[key] = _Job(asked, submission)
            self._encoding.append(key)
            self._start_threads()
            self._work.notify_all()
            return submission

    def _start_threads(self) -> None:
        if self._threads:
            return
        _running.add(self)
        reference = weakref.ref(self)
        works = [Scheduler._compute_next]
        if self._workplace.encodes_beside:
            works.append(Scheduler._encode_next)
        for work in works:
            thread = threading.Thread(
                target=_run, args=(reference, self._work, work), name="lowtide", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _cancel(self, key: int) -> None:
        with self._work:
            job = self._jobs.pop(key, None)
            if job is None:
                return
            self._cancelled.append(key)
            self._work.notify_all()
        job.submission.fail_cancelled()

    def wait(self) -> None:
        """Wait until every submitted answer has ended."""
        for job in list(self._jobs.values()):
            with contextlib.suppress(Exception):
                job.submission.result()

    def close(self, error: Exception) -> None:
        """End all answers with `error`, and the threads; called between passes. Closing twice is allowed."""
        with self._work:
            self._is_closed = True
            jobs, self._jobs = list(self._jobs.values()), {}
            self._work.notify_all()
        for job in jobs:
            job.submission.fail(error)

    def join(self) -> None:
        """Wait until the threads have ended, after `close`; from one of them it does nothing."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _has_work(self, work: Callable[[Scheduler], None]) -> bool:
        """Whether there is something to do for the thread that does `work`; called inside the condition."""
        if self._is_closed:
            return True
        if work is Scheduler._encode_next:
            return bool(self._encoding)
        has_new = bool(self._encoded) or (
            not self._workplace.encodes_beside and bool(self._encoding)
        )
        return has_new or bool(self._cancelled) or not self._workplace.is_idle

    def _encode_next(self) -> None:
        """Encode the prompt that waits longest, on the calling thread."""
        with self._work:
            if not self._encoding:
                return
            key = self._encoding.popleft()
            job = self._jobs.get(key)
        if job is None:
            return
        try:
            job.request, job.prompt = self._workplace.encode(job.asked)
        except Exception as error:
            self._end(key, error)
            return
        with self._work:
            self._encoded.append(key)
            self._work.notify_all()

    def _compute_next(self) -> None:
        """Let answers join and leave, compute a pass, and deliver what it gives."""
        workplace = self._workplace
        try:
            with workplace.between_passes():
                if not workplace.encodes_beside and workplace.is_idle:
                    self._encode_next()
                self._leave_and_join()
                outcomes = list(workplace.step())
        except Exception as error:
            self._fail_all(error)
            return
        num_tokens = 0
        for key, outcome in outcomes:
            assert isinstance(key, int), "the keys are the scheduler's"
            if isinstance(outcome, Exception):
                self._end(key, outcome)
                continue
            num_tokens += outcome.token_id is not None
            self._deliver(key, outcome)
        self._meter.add_tokens(num_tokens)

    def _leave_and_join(self) -> None:
        with self._work:
            cancelled, self._cancelled = self._cancelled, deque()
            encoded, self._encoded = self._encoded, deque()
        for key in cancelled:
            self._workplace.remove(key)
        for key in encoded:
            job = self._jobs.get(key)
            if job is not None and job.request is not None:
                job.began_at = time.monotonic()
                self._workplace.add(key, job.request)

    def _deliver(self, key: int, chunk: GenerationChunk) -> None:
        job = self._jobs.get(key)
        if job is None:
            return
        if chunk.token_id is not None:
            job.token_ids.append(chunk.token_id)
        if chunk.finish_reason is not None:
            self._jobs.pop(key, None)
            self._meter.add_answer(time.monotonic() - job.began_at)
            if job.prompt is not None:
                self._workplace.remember(job.prompt, job.token_ids)
        job.submission.add_chunk(chunk)

    def _end(self, key: int, error: Exception) -> None:
        job = self._jobs.pop(key, None)
        if job is not None:
            job.submission.fail(error)

    def _fail_all(self, error: Exception) -> None:
        """End the answers that have joined, with an error that is none of theirs; the others go on waiting."""
        for key in [key for key, job in self._jobs.items() if job.began_at]:
            with contextlib.suppress(Exception):
                self._workplace.remove(key)
            self._end(key, error)


def _run(
    reference: weakref.ref[Scheduler],
    condition: threading.Condition,
    work: Callable[[Scheduler], None],
) -> None:
    """Do `work` while there is some. While there is none, the scheduler may be collected."""
    while True:
        scheduler = reference()
        if scheduler is None or scheduler._is_closed:
            return
        with condition:
            if not scheduler._has_work(work):
                del scheduler
                condition.wait(IDLE_S)
                continue
        work(scheduler)
        del scheduler


@atexit.register
def _close_all() -> None:
    """End the threads before the interpreter ends, which would stop them inside a pass."""
    for scheduler in list(_running):
        scheduler.close(RuntimeUnusable("the process ends"))
        scheduler.join()
