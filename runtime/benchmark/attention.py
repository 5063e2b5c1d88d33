"""Bench: speed by depth of each attention policy against the engine's own attention, interleaved.

The engine is llama.cpp, and of an ONNX graph onnxruntime, which runs it whole.

Every case has a process of its own and they take turns, so that a machine whose speed drifts is as fair to
one as to the other. Ratios are medians over the rounds; above 1 we are faster.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from lowtide.memory.os.cgroup import ControlGroup, limit_for
from lowtide.memory.units import KilledByLimit, format_bytes
from lowtide.models.errors import BadOption, LowtideError
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.spec import ModelSpec

PEER = "llama"
STARTING = (
    "import sys; first = sys.stdin.readline(); "
    "from lowtide.runtime.benchmark.worker import serve; serve(first)"
)
"""A worker takes no memory to speak of before it is asked: where it is to be held, it is by then."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchCase:
    """One policy at one depth against the engine's own; tokens a second, memory of its process.

    `attention` is the policy as it was asked for, `policy` what that meant for this model.
    """

    attention: str
    policy: str
    speculate: str | None
    depth: int
    decode_ratio: float
    prefill_ratio: float
    ttft_ratio: float
    decode_tokens_per_s: float
    peer_decode_tokens_per_s: float
    prefill_tokens_per_s: float
    peer_prefill_tokens_per_s: float
    peak_rss_bytes: int
    peer_peak_rss_bytes: int
    layers_native: int
    layers: int
    repacked_tensors: int
    peer: str

    def to_dict(self) -> dict[str, Any]:
        """Return the documented JSON values."""
        return asdict(self)


class BenchFailed(LowtideError):
    """A case could not be run; the message is its process's own."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class CaseProcess:
    """A worker, in `group` where there is one; asked one thing at a time, `opening` first."""

    def __init__(
        self,
        path: str,
        options: dict[str, Any],
        group: ControlGroup | None,
        *,
        opening: str = "open",
    ) -> None:
        self._group = group
        self._process = subprocess.Popen(
            [sys.executable, "-c", STARTING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            if group is not None:
                group.admit(self._process.pid)
                group.hold(limit_for(options["memory"]))
            self.ask(opening, path=path, options=options)
        except BaseException:
            self.close()
            raise

    def ask(self, name: str, **values: Any) -> dict[str, Any]:
        """Return the worker's answer; raises `BenchFailed` with its error, `KilledByLimit` where it was."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": name, **values}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchFailed(answer["error"], answer["exit_code"])
        return answer

    def _ended(self) -> LowtideError:
        self._process.wait()
        if self._group is not None and self._group.num_kills:
            limit = format_bytes(self._group.limit_bytes or 0)
            return KilledByLimit(
                f"the kernel ended a case at its enforced limit of {limit}: raise --memory"
            )
        return BenchFailed("a case's process ended on its own: run lowtide doctor")

    def close(self) -> None:
        """End the worker."""
        try:
            self._process.kill()
            self._process.communicate()
        finally:
            if self._group is not None:
                self._group.remove()


class Bench:
    """The cases' processes; a context manager that ends them.

    Where they are `enforced`, the kernel holds each to `memory` of `options`; raises `NotEnforceable`
    where it cannot, and `KilledByLimit` where it ended one.
    """

    def __init__(
        self,
        spec: ModelSpec,
        attentions: Sequence[str],
        options: dict[str, Any],
        *,
        enforced: bool = False,
    ) -> None:
        self._peer_name = _peer_name(spec)
        self._processes: dict[str, CaseProcess] = {}
        try:
            for number, attention in enumerate((PEER, *attentions)):
                opened = {**options, "attention": attention}
                if number == 0:
                    opened["repack"] = False
                    if isinstance(spec, OnnxSpec):  # it keeps what the graph keeps
                        opened["kv_type"] = None
                group = ControlGroup.make(number=number) if enforced else None
                self._processes[attention] = CaseProcess(str(spec.path), opened, group)
        except BaseException:
            self._close()
            raise

    def run(
        self, depth: int, *, rounds: int, tokens: int, progress: Progress = lambda _: None
    ) -> list[BenchCase]:
        """Measure every case at `depth`: in each round a prompt, and then `tokens` decoded tokens."""
        prefills = self._interleaved("prefill", rounds, progress, depth=depth)
        decodes = self._interleaved(
            "decode", rounds, progress, warm=True, depth=depth, tokens=tokens
        )
        facts = {name: process.ask("facts") for name, process in self._processes.items()}
        return [
            BenchCase(
                attention=name,
                policy=facts[name]["attention"],
                speculate=None,
                depth=depth,
                decode_ratio=_ratio(decodes[PEER], decodes[name]),
                prefill_ratio=_ratio(prefills[PEER], prefills[name]),
                ttft_ratio=_ratio(prefills[PEER], prefills[name]),
                decode_tokens_per_s=tokens / statistics.median(decodes[name]),
                peer_decode_tokens_per_s=tokens / statistics.median(decodes[PEER]),
                prefill_tokens_per_s=depth / statistics.median(prefills[name]),
                peer_prefill_tokens_per_s=depth / statistics.median(prefills[PEER]),
                peak_rss_bytes=facts[name]["peak_rss_bytes"],
                peer_peak_rss_bytes=facts[PEER]["peak_rss_bytes"],
                layers_native=facts[name]["layers_native"],
                layers=facts[name]["layers"],
                repacked_tensors=facts[name]["repacked_tensors"],
                peer=self._peer_name,
            )
            for name in self._processes
            if name != PEER
        ]

    def _interleaved(
        self, what: str, rounds: int, progress: Progress, *, warm: bool = False, **values: Any
    ) -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {name: [] for name in self._processes}
        if warm:
            for process in self._processes.values():
                process.ask(what, **values)
        for number in range(rounds):
            for name, process in self._processes.items():
                progress(f"{what} at {values['depth']:,}, round {number + 1} of {rounds}: {name}")
                seconds[name].append(process.ask(what, **values)["seconds"])
        return seconds

    def _close(self) -> None:
        with (
            contextlib.ExitStack() as stack
        ):  # all of them, also where a second Ctrl-C comes meanwhile
            for process in self._processes.values():
                stack.callback(process.close)

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()


def check_attentions(attentions: Sequence[str]) -> None:
    """Raise `BadOption` for a policy that is given twice, or is the peer itself."""
    if PEER in attentions:
        raise BadOption(
            "attention is 'llama', which is what is measured against: name other policies"
        )
    if len(set(attentions)) < len(attentions):
        raise BadOption("attention names a policy twice: once each is wanted")


def _ratio(peers: Sequence[float], ours: Sequence[float]) -> float:
    return statistics.median(peer / our for peer, our in zip(peers, ours, strict=True))


def _peer_name(spec: ModelSpec) -> str:
    from importlib.metadata import version

    if isinstance(spec, OnnxSpec):
        return f"{spec.engine} {version(spec.engine)}, the graph with its own {spec.attention}"
    return f"llama.cpp, by llama-cpp-python {version('llama-cpp-python')}"
