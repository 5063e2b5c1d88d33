"""Fixtures of several folders, the `real` marker, the hypothesis profiles, and a core for each xdist worker."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# An editable install puts the checkout's parent folder on the path. Other folders there are not the package.
_PARENT = str(Path(__file__).resolve().parent.parent.parent)
sys.path[:] = [entry for entry in sys.path if entry != _PARENT]

from lowtide import Embedder, FakeModel, Runtime  # noqa: E402
from lowtide.models.catalog import resolve  # noqa: E402
from lowtide.models.gguf.header.spec import read_spec  # noqa: E402
from lowtide.models.spec import ModelSpec  # noqa: E402
from lowtide.runtime.backends.kernels import kernel_times  # noqa: E402

collect_ignore = ["smoke"]  # tests/wheel_test.sh runs them, outside the checkout

# `quick` draws the same examples in each run; `thorough` draws many new ones.
settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile("quick")

_MODEL_FIXTURES = {"real_runtime", "smollm2"}
"""Fixtures that hand out a real model: the tests that use them are `real`."""


def pytest_configure() -> None:
    """Give each worker of pytest-xdist a core of its own, so that threads of two workers do not spin for one."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use a real model's fixture."""
    for item in items:
        if _MODEL_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.real)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(
        "lowtide.attention.calibration.calibration_folder", lambda: tmp_path / "calibrations"
    )
    monkeypatch.setattr("lowtide.models.facts.store.facts_folder", lambda: tmp_path / "facts")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Store repacked copies and measurements for the tests alone; processes that tests start inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _compare_kernels_once() -> Iterator[None]:
    """Compare the kernels once for each shape, because every test has an empty folder of measurements."""
    measured: dict[object, kernel_times.KernelTimes] = {}
    measure = kernel_times.measure

    def once(spec: ModelSpec) -> kernel_times.KernelTimes:
        shape = (
            spec.tensor_types, spec.embedding_width, spec.feed_forward_width, spec.num_heads,
            spec.num_kv_heads, spec.key_head_dim,
        )  # fmt: skip
        if shape not in measured:
            measured[shape] = measure(spec)
        return measured[shape]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_times, "measure", once)
        yield


@pytest.fixture(autouse=True)
def closed_after_the_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close the runtimes and embedders that a test opens: a dropped one warns, and warnings are errors.

    Those of fixtures with a wider scope close themselves.
    """
    opened: list[Runtime | Embedder] = []

    def remembering(init: Callable[..., None]) -> Callable[..., None]:
        def remembered(self: Any, *arguments: Any, **options: Any) -> None:
            init(self, *arguments, **options)
            opened.append(self)

        return remembered

    for kind in (Runtime, Embedder):
        monkeypatch.setattr(kind, "__init__", remembering(kind.__init__))
    yield
    for one in reversed(opened):
        one.close()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return resolve("smollm2")


@pytest.fixture(scope="session")
def smollm2_spec() -> ModelSpec:
    """The default model's header: a test that reads no weights is not `real`."""
    return read_spec(resolve("smollm2"))


@pytest.fixture(scope="session")
def real_runtime(smollm2: Path):  # type: ignore[no-untyped-def]
    with Runtime.open(smollm2, memory="8GiB", context=2048) as runtime:
        yield runtime


@pytest.fixture
def fake_runtime() -> Iterator[Callable[..., Runtime]]:
    runtimes: list[Runtime] = []

    def open_runtime(*replies: str, context: int = 512, batch_size: int = 64) -> Runtime:
        model = FakeModel(replies or ("Hello.",), context=context, batch_size=batch_size)
        runtime = Runtime.open(model, memory="8GiB")
        runtime.fake = model  # type: ignore[attr-defined]
        runtimes.append(runtime)
        return runtime

    yield open_runtime
    for runtime in runtimes:
        runtime.close()
