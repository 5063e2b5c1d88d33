"""What the paired benchmark measures: tasks (a cache of some depth, prompts of some kind) and workers.

`attention_workers` and `speculation_workers` make the configurations that `lowtide bench` compares.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lowtide.models.arguments.names import option
from lowtide.models.arguments.paths import shown_path
from lowtide.models.arguments.text_files import decoded
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec
from lowtide.runtime.backends.backend import ResolvedModel
from lowtide.runtime.speculation.options import OFF, SpeculationArg

PREFILL, DECODE = "prefill", "decode"
ENGINE_POLICY = "llama"
"""The attention policy of the engine itself, which other policies are compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A method of the worker with its arguments; `phase` says which speed its time counts for."""

    label: str
    phase: str
    method: str
    values: Mapping[str, Any]
    warm_up: bool = False


class Task(Protocol):
    """A piece of work that every worker does in every round."""

    @property
    def label(self) -> str:
        """The task in the table's first column."""
        ...

    @property
    def requests(self) -> Sequence[Request]:
        """The requests, in the order in which they are sent."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON values that identify the task."""
        ...


@dataclass(frozen=True, slots=True)
class DepthTask:
    """Compute a prompt of `depth` random tokens, then decode `tokens` tokens behind it."""

    depth: int
    tokens: int

    @property
    def label(self) -> str:
        """The depth of the cache."""
        return f"{self.depth:,}"

    @property
    def requests(self) -> Sequence[Request]:
        """A prefill, and a decode with one warm-up."""
        depth, tokens = self.depth, self.tokens
        return (
            Request(
                label=f"prefill of {depth:,} tokens",
                phase=PREFILL,
                method="prefill",
                values={"depth": depth},
            ),
            Request(
                label=f"decode at {depth:,} tokens",
                phase=DECODE,
                method="decode",
                values={"depth": depth, "tokens": tokens},
                warm_up=True,
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the depth."""
        return {"depth": self.depth}


@dataclass(frozen=True, slots=True)
class AnswerTask:
    """Answer `prompts` of one kind greedily, each with up to `tokens` tokens.

    `template_arguments` are variables of the chat template.
    """

    kind: str
    prompts: tuple[str, ...]
    tokens: int
    template_arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        """The kind of the prompts."""
        return self.kind

    @property
    def requests(self) -> Sequence[Request]:
        """One generation per prompt."""
        return tuple(
            Request(
                label=f"{self.kind}, prompt {number} of {len(self.prompts)}",
                phase=DECODE,
                method="answer",
                values={
                    "prompt": prompt,
                    "tokens": self.tokens,
                    "template_arguments": dict(self.template_arguments),
                },
            )
            for number, prompt in enumerate(self.prompts, start=1)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and how many prompts it has."""
        return {"kind": self.kind, "num_prompts": len(self.prompts)}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """A configuration to measure: the name it is reported under, and the keywords of its `LoadConfig`.

    `attention` and `speculate` are the settings as the user wrote them.
    """

    name: str
    attention: str
    speculate: str
    options: dict[str, Any]


def worker_options(planned: ResolvedModel) -> dict[str, Any]:
    """Return the keywords of the `LoadConfig` that load a model in a worker as it was planned."""
    asked, plan = planned.options, planned.plan
    return {
        "memory": plan.budget.num_bytes,
        "context": plan.context,
        "expected_tokens": asked.expected_tokens,
        "kv_type": plan.kv_type,
        "threads": asked.num_threads,
        "batch_size": plan.batch_size,
        "repack": asked.repack,
        "chat_template": asked.chat_template,
        "structured": asked.structured,
    }


def attention_workers(
    spec: ModelSpec, attentions: Sequence[str], options: dict[str, Any]
) -> list[WorkerConfig]:
    """Return a worker per policy, after the engine's own attention without repacked weights as baseline.

    Raises `BadOption` for a policy that is named twice, and for the engine's own.
    """
    if ENGINE_POLICY in attentions:
        raise BadOption(
            f"attention {ENGINE_POLICY!r} is the baseline of the benchmark: name other policies"
        )
    if len(set(attentions)) < len(attentions):
        raise BadOption(f"{option('attention')} names a policy twice: name each policy once")
    # The baseline of an ONNX model runs its graph as it is, whose KV cache has a type of its own.
    kv_type = options["kv_type"] if options["kv_type"] in spec.kv_types else None
    baseline = WorkerConfig(
        name=spec.engine,
        attention=ENGINE_POLICY,
        speculate=OFF,
        options={**options, "repack": False, "kv_type": kv_type},
    )
    return [
        baseline,
        *(
            WorkerConfig(name=attention, attention=attention, speculate=OFF, options=options)
            for attention in attentions
        ),
    ]


def speculation_workers(
    attention: str, speculations: Sequence[str], options: dict[str, Any]
) -> list[WorkerConfig]:
    """Return a worker per draft, after one without speculation as baseline; all with one attention policy.

    Raises `BadOption` for a draft that is named twice, or is unknown, and for "off".
    """
    for speculate in speculations:
        if SpeculationArg.parse(speculate).is_off:
            raise BadOption("speculate 'off' is the baseline of the benchmark: leave it out")
    if len(set(speculations)) < len(speculations):
        raise BadOption(f"{option('speculate')} names a draft twice: name each draft once")
    return [
        WorkerConfig(name=speculate, attention=attention, speculate=speculate, options=options)
        for speculate in (OFF, *speculations)
    ]


PARAGRAPH = (
    "The mill stands where the river leaves the wood. In spring the wheel turns day and night, and the "
    "miller sleeps with cotton in his ears. In summer the water is low, and he mends sacks. Nobody has "
    "counted the steps to the loft, for they are never the same."
)
CODE = (
    "def widest(boxes):\n    best = boxes[0]\n    for box in boxes:\n        if box.width > best.width:\n"
    "            best = box\n    return best\n"
)
BUILT_IN_PROMPTS: dict[str, list[str]] = {
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
"""Prompts by kind, from answers that share no text with the prompt to answers that copy it."""


def read_prompts(path: Path, max_per_kind: int) -> dict[str, list[str]]:
    """Return the first prompts of each kind in a file of JSON lines with `category` and `turns`.

    Takes the first turn of each entry. Raises `BadOption` if the file has another format.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    try:
        for line in filter(None, decoded(path.read_bytes(), shown_path(path)).splitlines()):
            entry = json.loads(line)
            if len(kinds[entry["category"]]) < max_per_kind:
                kinds[entry["category"]].append(str(entry["turns"][0]))
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise BadOption(
            f"cannot read prompts from {shown_path(path)} ({error!r}): write one JSON object per line, with "
            '"category" and "turns"'
        ) from error
    if not kinds:
        raise BadOption(f"{path} has no prompts: write one JSON object per line")
    return dict(kinds)
