"""The overhead of a profiler: decoding with and without one, in turn. The goal is less than 2 %."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from paired import paired

from lowtide import Profiler, Runtime

pytestmark = pytest.mark.benchmark


@pytest.mark.parametrize("attention", ["llama", "dense"])
def test_decode_with_a_profiler(benchmark: Any, smollm2: Path, attention: str) -> None:
    profiler = Profiler()
    answers: list[tuple[int, ...]] = []

    def decoding(runtime: Runtime) -> Callable[[], None]:
        def decode() -> None:
            result = runtime.generate("The tide comes in. " * 40, max_tokens=64, temperature=0)
            answers.append(result.token_ids)

        return decode

    with ExitStack() as stack:
        profiled, plain = (
            stack.enter_context(
                Runtime.open(
                    smollm2, memory="8GiB", context=1024, attention=attention, profiler=observer
                )
            )
            for observer in (profiler, None)
        )
        name = f"decode with a profiler, {attention}"
        paired(benchmark, name, decoding(profiled), decoding(plain), rounds=25, peer="without it")
        report = profiler.report()
    assert len(set(answers)) == 1
    assert report.num_timed_passes[1] > 50 and len(report.layers) == 31
