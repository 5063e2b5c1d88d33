"""The command line with a fake model whose answers the test sets."""

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
    """Invoke a command with `replies` as the model's answers; `lowtide.models` are the loaded models."""
    loaded: list[FakeModel] = []

    def invoke(
        *arguments: str,
        replies: tuple[str, ...] = ("Hello.",),
        context: int = 512,
        input: str | bytes | None = None,
    ) -> Result:
        class Loaded(FakeModel):
            handle = None
            """No weights of llama.cpp."""

            def attach_pages(self, _pages: object) -> None:
                """Do nothing: a fake model has no pages."""

            def attach_threads(self, _threads: object) -> None:
                """Do nothing: a fake model computes on the thread that asks."""

        def load(_spec: Any, _options: Any, _kernels: Any) -> FakeModel:
            loaded.append(Loaded(replies, context=context))
            return loaded[-1]

        spec = FakeModel(context=context).spec
        monkeypatch.setattr("lowtide.runtime.planning.plan.read_spec", lambda _path: spec)
        monkeypatch.setattr("lowtide.runtime.backends.gguf.GgufModel", load)
        runner = CliRunner()
        return runner.invoke(
            main, [*arguments, "--memory", "4GiB"], input=input, catch_exceptions=False
        )

    invoke.models = loaded  # type: ignore[attr-defined]
    return invoke
