"""SchemaBenchmark: every schema of a file is answered by each engine in turn, each in a process of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowtide.memory.os.cgroup import ControlGroup
from lowtide.models.spec import ModelSpec
from lowtide.runtime.benchmark.paired import WorkerProcess
from lowtide.runtime.benchmark.schemas.cases import EngineSummary, SchemaCase, is_valid, summary_of


def run_schemas(
    spec: ModelSpec,
    engines: Sequence[str],
    cases: Sequence[SchemaCase],
    tokens: int,
    options: Mapping[str, Any],
    *,
    template_arguments: Mapping[str, Any],
    enforced: bool,
    progress: Callable[[str], None],
) -> list[EngineSummary]:
    """Return what each engine made of the cases, in answers of up to `tokens` tokens.

    `options` are the keywords of the workers' `LoadConfig`. Raises `BadOption` before the first answer for a schema
    that no answer can be checked against.
    """
    for case in cases:
        is_valid(case.schema, "null")
    answers: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    with contextlib.ExitStack() as stack:
        workers = {}
        for number, engine in enumerate(engines):
            group = ControlGroup.make(number=number) if enforced else None
            workers[engine] = WorkerProcess(str(spec.path), dict(options), group)
            stack.callback(workers[engine].close)
        for number, case in enumerate(cases, start=1):
            progress(f"schema {number} of {len(cases)}: {case.id}")
            for engine, worker in workers.items():
                values = {"schema": case.schema, "prompt": case.prompt, "tokens": tokens}
                answers[engine].append(
                    worker.ask(
                        "schema_answer",
                        engine=engine,
                        template_arguments=dict(template_arguments),
                        **values,
                    )
                )
    return [summary_of(engine, cases, answers[engine]) for engine in engines]
