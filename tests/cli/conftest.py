"""The command line over a model that says what the test wants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lowtide import FakeModel
from lowtide.cli.main import main

Invoke = Callable[..., Result]


@pytest.fixture
def lowtide(monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Invoke a command with `replies` as the model's answers; `fake.models` are those it opened."""
    opened: list[FakeModel] = []

    def invoke(
        *arguments: str,
        replies: tuple[str, ...] = ("Hello.",),
        context: int = 512,
        input: str | bytes | None = None,
    ) -> Result:
        def load(_spec: Any, _options: Any) -> FakeModel:
            opened.append(FakeModel(replies, context=context))
            return opened[-1]

        spec = FakeModel(context=context).spec
        monkeypatch.setattr("lowtide.runtime.planning.plan.read_spec", lambda _path: spec)
        monkeypatch.setattr("lowtide.runtime.loading.gguf.GgufModel", load)
        runner = CliRunner()
        return runner.invoke(
            main, [*arguments, "--memory", "8GiB"], input=input, catch_exceptions=False
        )

    invoke.models = opened  # type: ignore[attr-defined]
    return invoke
