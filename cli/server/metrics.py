"""Metrics: counts of what the server did, as Prometheus reads them. They name no prompt, answer or client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lowtide.runtime.serving.deltas import Finish


class Metrics:
    """Counts requests and tokens."""

    def __init__(self) -> None:
        self._requests = Counter[tuple[str, int]]()
        self._tokens = Counter[str]()
        self._seconds = {"prefill": 0.0, "decode": 0.0}
        self._ended = Counter[str]()
        self.num_cancelled = 0
        self.num_refused = 0

    def count_request(self, path: str, status: int) -> None:
        """Count an answered request."""
        self._requests[path, status] += 1
        self.num_refused += status == 429

    def count_answer(self, finish: Finish) -> None:
        """Count an answer that ended."""
        stats = finish.stats
        self._ended[finish.own_reason] += 1
        self._tokens["prompt"] += stats.prompt_tokens
        self._tokens["reused"] += stats.reused_tokens
        self._tokens["generated"] += stats.generated_tokens
        self._seconds["prefill"] += stats.prefill_s
        self._seconds["decode"] += stats.decode_s
        speculation = stats.speculation or {}
        for name in ("drafted", "accepted"):
            self._tokens[name] += int(speculation.get(name) or 0)

    def totals(self) -> dict[str, Any]:
        """Return the sums of tokens and seconds."""
        return {"tokens": dict(self._tokens), "seconds": dict(self._seconds)}

    def text(self, gauges: Mapping[str, tuple[str, float | Mapping[str, float]]]) -> str:
        """Return all counters and `gauges` (name: help and value, or values by component)."""
        lines: list[str] = []
        requests = {
            _labels(path=path, status=str(status)): count
            for (path, status), count in sorted(self._requests.items())
        }
        _add(lines, "requests_total", "counter", "Answered requests.", requests)
        _add(lines, "tokens_total", "counter", "Tokens by kind.", _by("kind", self._tokens))
        _add(lines, "seconds_total", "counter", "Computing time.", _by("phase", self._seconds))
        _add(lines, "answers_total", "counter", "Ended answers.", _by("reason", self._ended))
        _add(lines, "cancelled_total", "counter", "Answers that clients left.", self.num_cancelled)
        _add(
            lines, "refused_total", "counter", "Requests that found a full queue.", self.num_refused
        )
        for name, (help, value) in gauges.items():
            values = value if isinstance(value, (int, float)) else _by("component", value)
            _add(lines, name, "gauge", help, values)
        return "\n".join(lines) + "\n"


def _add(lines: list[str], name: str, kind: str, help: str, values: Any) -> None:
    lines += [f"# HELP lowtide_{name} {help}", f"# TYPE lowtide_{name} {kind}"]
    by_labels: Mapping[str, float] = values if isinstance(values, Mapping) else {"": values}
    lines += [f"lowtide_{name}{labels} {value:g}" for labels, value in by_labels.items()]


def _by(label: str, values: Mapping[str, float]) -> dict[str, float]:
    return {_labels(**{label: name}): value for name, value in values.items()}


def _labels(**values: str) -> str:
    pairs: Iterable[str] = (f'{name}="{_escaped(value)}"' for name, value in values.items())
    return "{" + ",".join(pairs) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
