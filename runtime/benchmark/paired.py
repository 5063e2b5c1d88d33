"""PairedBenchmark: configurations of one model against a baseline, interleaved, each in its own process.

The first worker is the baseline. In every round each worker does the same piece of work, one after the other,
so that a machine whose speed drifts treats all of them alike. A ratio is the median over the rounds of
baseline time over own time, both per token: above 1 means faster than the baseline.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from lowtide.memory.os.cgroup import ControlGroup, limit_for
from lowtide.memory.units import KilledByLimit, format_bytes
from lowtide.models.arguments.names import option
from lowtide.models.errors import LowtideError
from lowtide.models.spec import ModelSpec
from lowtide.runtime.benchmark.tasks import DECODE, PREFILL, Request, Task, WorkerConfig

WORKER_CODE = (
    "import sys; first = sys.stdin.readline(); "
    "from lowtide.runtime.benchmark.worker import serve; serve(first)"
)
"""A worker imports nothing before its first request: the memory limit, if any, is set before that."""

Progress = Callable[[str], None]
Answer = dict[str, Any]
"""A worker's answer to a request: `seconds`, `tokens`, and for generations `token_ids` and `speculation`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Tokens per second, those of the baseline, and the median ratio of the two."""

    ratio: float
    tokens_per_s: float
    peer_tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftCounts:
    """Speculation in the last round: drafted and accepted tokens.

    `same` says whether all answers equal the baseline's, `identical` whether that is guaranteed;
    `off_reason` says why nothing was verified, None if something was.
    """

    drafted: int
    accepted: int
    same: bool
    identical: bool
    off_reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkCase:
    """One configuration on one task against the baseline.

    `policy` is the attention policy as resolved for the model, `peer` describes the baseline. `prefill` is
    None for tasks that do not time prompts, `drafts` for configurations without speculation.
    """

    task: Task
    name: str
    attention: str
    speculate: str
    policy: str
    decode: Speed
    prefill: Speed | None
    drafts: DraftCounts | None
    peak_rss_bytes: int
    peer_peak_rss_bytes: int
    layers_native: int
    layers: int
    repacked_tensors: int
    peer: str

    def to_dict(self) -> dict[str, Any]:
        """Return the documented JSON values."""
        values: dict[str, Any] = {
            **self.task.to_dict(),
            "attention": self.attention,
            "policy": self.policy,
            **_speed_values("decode", self.decode),
        }
        if self.prefill is not None:
            values |= _speed_values("prefill", self.prefill)
        values |= {
            "peak_rss_bytes": self.peak_rss_bytes,
            "peer_peak_rss_bytes": self.peer_peak_rss_bytes,
            "layers_native": self.layers_native,
            "layers": self.layers,
            "repacked_tensors": self.repacked_tensors,
            "peer": self.peer,
        }
        if self.drafts is not None:
            values |= {
                "speculate": self.speculate,
                "drafted": self.drafts.drafted,
                "accepted": self.drafts.accepted,
                "same": self.drafts.same,
                "identical": self.drafts.identical,
                "off_reason": self.drafts.off_reason,
            }
        return values


def _speed_values(name: str, speed: Speed) -> dict[str, float]:
    return {
        f"{name}_ratio": speed.ratio,
        f"{name}_tokens_per_s": speed.tokens_per_s,
        f"peer_{name}_tokens_per_s": speed.peer_tokens_per_s,
    }


class BenchmarkFailed(LowtideError):
    """A worker failed; the message is the worker's own."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class WorkerProcess:
    """A worker in a process of its own, in `group` if there is one; answers one request at a time."""

    def __init__(self, path: str, options: dict[str, Any], group: ControlGroup | None) -> None:
        self._group = group
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER_CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            if group is not None:
                group.admit(self._process.pid)
                group.set_limit(limit_for(options["memory"]))
            self.ask("open", path=path, options=options)
        except BaseException:
            self.close()
            raise

    def ask(self, name: str, **values: Any) -> Answer:
        """Return the worker's answer.

        Raises `BenchmarkFailed` with the worker's error, `KilledByLimit` if the kernel killed the worker.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": name, **values}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._death()
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise BenchmarkFailed(answer["error"], answer["exit_code"])
        return answer

    def _death(self) -> LowtideError:
        self._process.wait()
        if self._group is not None and self._group.num_kills:
            limit = format_bytes(self._group.limit_bytes or 0)
            return KilledByLimit(
                f"the kernel killed a benchmark process at the enforced limit of {limit}: raise {option('memory')}"
            )
        return BenchmarkFailed("a benchmark process died: run lowtide doctor")

    def close(self) -> None:
        """End the process and remove its group."""
        try:
            self._process.kill()
            self._process.communicate()
        finally:
            if self._group is not None:
                self._group.remove()


class PairedBenchmark:
    """Runs `tasks` on `workers`, the first of which is the baseline. A context manager: it owns processes.

    With `enforced`, the kernel limits each worker to the `memory` of its options. Raises `NotEnforceable` if
    that is impossible, and `KilledByLimit` if the kernel kills a worker.
    """

    def __init__(
        self,
        spec: ModelSpec,
        workers: Sequence[WorkerConfig],
        tasks: Sequence[Task],
        *,
        enforced: bool = False,
    ) -> None:
        self._baseline, *self._measured = workers
        self._tasks = tasks
        self._processes: dict[str, WorkerProcess] = {}
        try:
            for number, worker in enumerate(workers):
                group = ControlGroup.make(number=number) if enforced else None
                options = {
                    **worker.options,
                    "attention": worker.attention,
                    "speculate": worker.speculate,
                }
                self._processes[worker.name] = WorkerProcess(str(spec.path), options, group)
        except BaseException:
            self.close()
            raise

    def run(self, *, rounds: int, progress: Progress = lambda _: None) -> list[BenchmarkCase]:
        """Run every task `rounds` times on every worker; return a case per task and measured worker."""
        cases: list[BenchmarkCase] = []
        for task in self._tasks:
            answers = [self._interleaved(request, rounds, progress) for request in task.requests]
            facts = {name: process.ask("facts") for name, process in self._processes.items()}
            cases += (self._case(task, worker, answers, facts) for worker in self._measured)
        return cases

    def _interleaved(
        self, request: Request, rounds: int, progress: Progress
    ) -> dict[str, list[Answer]]:
        """Return every worker's answers to a request, one per round."""
        answers: dict[str, list[Answer]] = {name: [] for name in self._processes}
        unit = "round" if rounds == 1 else "rounds"
        progress(f"{request.label}: {rounds} {unit} with {', '.join(answers)}")
        if request.warm_up:
            for process in self._processes.values():
                process.ask(request.method, **request.values)
        for _ in range(rounds):
            for name, process in self._processes.items():
                answers[name].append(process.ask(request.method, **request.values))
        return answers

    def _case(
        self,
        task: Task,
        worker: WorkerConfig,
        answers: Sequence[Mapping[str, list[Answer]]],
        facts: Mapping[str, Answer],
    ) -> BenchmarkCase:
        peer = self._baseline.name
        pairs = [(of_request[peer], of_request[worker.name]) for of_request in answers]
        speeds = {
            phase: _speed(
                [p for p, r in zip(pairs, task.requests, strict=True) if r.phase == phase]
            )
            for phase in {request.phase for request in task.requests}
        }
        own = facts[worker.name]
        return BenchmarkCase(
            task=task,
            name=worker.name,
            attention=worker.attention,
            speculate=worker.speculate,
            policy=own["policy"],
            decode=speeds[DECODE],
            prefill=speeds.get(PREFILL),
            drafts=_draft_counts(pairs),
            peak_rss_bytes=own["peak_rss_bytes"],
            peer_peak_rss_bytes=facts[peer]["peak_rss_bytes"],
            layers_native=own["layers_native"],
            layers=own["layers"],
            repacked_tensors=own["repacked_tensors"],
            peer=facts[peer]["engine"],
        )

    def close(self) -> None:
        """End all processes, even if a second Ctrl-C arrives meanwhile."""
        with contextlib.ExitStack() as stack:
            for process in self._processes.values():
                stack.callback(process.close)

    def __enter__(self) -> PairedBenchmark:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


Pair = tuple[Sequence[Answer], Sequence[Answer]]
"""The answers of the baseline and of a worker to the same request, one per round."""


def _speed(pairs: Sequence[Pair]) -> Speed:
    """Return the speeds over some requests; the ratio is the mean of the requests' median ratios."""
    return Speed(
        ratio=statistics.mean(_ratio(peer, own) for peer, own in pairs),
        tokens_per_s=_tokens_per_s([own for _, own in pairs]),
        peer_tokens_per_s=_tokens_per_s([peer for peer, _ in pairs]),
    )


def _ratio(peer: Sequence[Answer], own: Sequence[Answer]) -> float:
    """Return the median ratio of the seconds per token: answers that differ may differ in length."""
    rounds = zip(peer, own, strict=True)
    return statistics.median(_token_s(one) / max(_token_s(other), 1e-9) for one, other in rounds)


def _token_s(answer: Answer) -> float:
    return float(answer["seconds"] / max(answer["tokens"], 1))


def _tokens_per_s(requests: Sequence[Sequence[Answer]]) -> float:
    """Return tokens per second over all requests, with the median seconds of each."""
    tokens = sum(rounds[-1]["tokens"] for rounds in requests)
    seconds = sum(statistics.median(answer["seconds"] for answer in rounds) for rounds in requests)
    return float(tokens / max(seconds, 1e-9))


def _draft_counts(pairs: Sequence[Pair]) -> DraftCounts | None:
    last = [own[-1].get("speculation") for _, own in pairs]
    known = [stats for stats in last if stats is not None]
    if not known:
        return None
    return DraftCounts(
        drafted=sum(stats["drafted"] for stats in known),
        accepted=sum(stats["accepted"] for stats in known),
        same=all(
            one["token_ids"] == other["token_ids"]
            for peer, own in pairs
            for one, other in zip(peer, own, strict=True)
        ),
        identical=all(stats["identical"] for stats in known),
        off_reason=None if any(stats["rounds"] for stats in known) else known[0]["off_reason"],
    )
