"""SpeculationBench: answers with speculation against the plain loop's, prompt by prompt and in turn.

Both sides have a process of their own, as in `bench`; ratios are medians over the rounds, means over the
prompts of a kind, and above 1 speculation is faster.

Prompts by kind, to measure speculation on: of the package's own, or of a file. Knows no model."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from lowtide.memory.os.cgroup import ControlGroup
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec
from lowtide.runtime.benchmark.attention import CaseProcess
from lowtide.runtime.speculation.options import OFF, SpeculationArg

OPENING = "open_answers"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationCase:
    """One way to speculate on one kind of prompt against the plain loop; rates in tokens a second.

    `drafted` and `accepted` count tokens of the last round's answers, `same` says whether those were the
    plain loop's, `identical` whether that is promised; `off_reason` is None where something was verified.
    """

    kind: str
    num_prompts: int
    attention: str
    speculate: str
    decode_ratio: float
    decode_tokens_per_s: float
    plain_decode_tokens_per_s: float
    drafted: int
    accepted: int
    same: bool
    identical: bool
    off_reason: str | None
    peak_rss_bytes: int
    plain_peak_rss_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the documented JSON values."""
        return asdict(self)


class SpeculationBench:
    """The sides' processes, the plain one first; a context manager that ends them."""

    def __init__(
        self,
        spec: ModelSpec,
        speculations: Sequence[str],
        options: dict[str, Any],
        *,
        enforced: bool = False,
    ) -> None:
        self._sides: dict[str, CaseProcess] = {}
        try:
            for number, name in enumerate((OFF, *speculations)):
                group = ControlGroup.make(number=number) if enforced else None
                opened = {**options, "speculate": name}
                self._sides[name] = CaseProcess(str(spec.path), opened, group, opening=OPENING)
        except BaseException:
            self._close()
            raise

    def run(
        self,
        kinds: Mapping[str, Sequence[str]],
        *,
        rounds: int,
        tokens: int,
        progress: Callable[[str], None] = lambda _: None,
    ) -> list[SpeculationCase]:
        """Have every side answer every prompt `rounds` times, in turn, and return the cases by kind."""
        cases: list[SpeculationCase] = []
        for kind, prompts in kinds.items():
            progress(f"{kind}, {rounds} rounds")
            told = [self._answers(prompt, rounds, tokens) for prompt in prompts]
            facts = {name: side.ask("facts") for name, side in self._sides.items()}
            cases += (_case(kind, name, told, facts) for name in self._sides if name != OFF)
        return cases

    def _answers(self, prompt: str, rounds: int, tokens: int) -> dict[str, list[dict[str, Any]]]:
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in self._sides}
        for _ in range(rounds):
            for name, side in self._sides.items():
                answers[name].append(side.ask("answer", prompt=prompt, tokens=tokens))
        return answers

    def _close(self) -> None:
        with contextlib.ExitStack() as stack:
            for side in self._sides.values():
                stack.callback(side.close)

    def __enter__(self) -> SpeculationBench:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()


def check_speculations(speculations: Sequence[str]) -> None:
    """Raise `BadOption` for one that is given twice, or is none."""
    for stated in speculations:
        if SpeculationArg.parse(stated).is_off:
            raise BadOption("speculate is 'off', which is what is measured against: leave it out")
    if len(set(speculations)) < len(speculations):
        raise BadOption("speculate names a draft twice: once each is wanted")


def _case(
    kind: str,
    name: str,
    told: Sequence[dict[str, list[dict[str, Any]]]],
    facts: Mapping[str, dict[str, Any]],
) -> SpeculationCase:
    last = [answers[name][-1]["speculation"] for answers in told]
    return SpeculationCase(
        kind=kind,
        num_prompts=len(told),
        attention=facts[name]["attention"],
        speculate=name,
        decode_ratio=statistics.mean(_ratio(answers[OFF], answers[name]) for answers in told),
        decode_tokens_per_s=_rate([answers[name] for answers in told]),
        plain_decode_tokens_per_s=_rate([answers[OFF] for answers in told]),
        drafted=sum(stats["drafted"] for stats in last),
        accepted=sum(stats["accepted"] for stats in last),
        same=all(
            one["token_ids"] == other["token_ids"]
            for answers in told
            for one, other in zip(answers[OFF], answers[name], strict=True)
        ),
        identical=all(stats["identical"] for stats in last),
        off_reason=None if any(stats["rounds"] for stats in last) else last[0]["off_reason"],
        peak_rss_bytes=facts[name]["peak_rss_bytes"],
        plain_peak_rss_bytes=facts[OFF]["peak_rss_bytes"],
    )


def _ratio(plain: Sequence[dict[str, Any]], drafting: Sequence[dict[str, Any]]) -> float:
    """The median of the rounds' ratios of seconds a token: answers that differ differ in length, too."""
    pairs = zip(plain, drafting, strict=True)
    return statistics.median(_token_s(one) / max(_token_s(other), 1e-9) for one, other in pairs)


def _token_s(answer: dict[str, Any]) -> float:
    return float(answer["seconds"] / max(answer["decoded"], 1))


def _rate(answers: Sequence[Sequence[dict[str, Any]]]) -> float:
    """Tokens a second over all prompts, each prompt's median round."""
    decoded = sum(rounds[-1]["decoded"] for rounds in answers)
    seconds = sum(statistics.median(a["seconds"] for a in rounds) for rounds in answers)
    return float(decoded / max(seconds, 1e-9))


PARAGRAPH = (
    "The mill stands where the river leaves the wood. In spring the wheel turns day and night, and the "
    "miller sleeps with cotton in his ears. In summer the water is low, and he mends sacks. Nobody has "
    "counted the steps to the loft, for they are never the same."
)
CODE = (
    "def widest(boxes):\n    best = boxes[0]\n    for box in boxes:\n        if box.width > best.width:\n"
    "            best = box\n    return best\n"
)
OWN_PROMPTS: dict[str, list[str]] = {
    "question": ["Why does bread rise?"],
    "writing": ["Write a short letter to a friend who has moved to the sea."],
    "rewrite": [f"Repeat this text word for word, and change river to stream:\n\n{PARAGRAPH}"],
    "quote": [f"Quote the whole text below, in quotation marks:\n\n{PARAGRAPH}"],
    "list": [
        "Continue this list up to item 20:\n"
        + "\n".join(f"Item {n}: sack number {n} is on cart {n}." for n in range(1, 8))
    ],
    "edit code": [f"Rename boxes to crates in this code and print all of it:\n\n{CODE}"],
}


def read_prompts(path: Path, most_of_a_kind: int) -> dict[str, list[str]]:
    """Return the first prompts of each kind in a file: a JSON object a line, with `category` and `turns`.

    Of several turns the first is taken. Raises `BadOption` where it cannot be read so.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    try:
        for line in filter(None, path.read_text(encoding="utf-8").splitlines()):
            entry = json.loads(line)
            if len(kinds[entry["category"]]) < most_of_a_kind:
                kinds[entry["category"]].append(str(entry["turns"][0]))
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise BadOption(
            f"{path} has no prompts that can be read ({error!r}): a JSON object a line is wanted, with "
            '"category" and "turns"'
        ) from error
    if not kinds:
        raise BadOption(f"{path} has no prompts: a JSON object a line is wanted")
    return dict(kinds)
