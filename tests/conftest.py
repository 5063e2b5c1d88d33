"""Fixtures that several folders share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# An editable install puts the checkout's parent folder on the path: what lies there is not ours.
_PARENT = str(Path(__file__).resolve().parent.parent.parent)
sys.path[:] = [entry for entry in sys.path if entry != _PARENT]

from lowtide import FakeModel, Runtime  # noqa: E402
from lowtide.models.catalog import resolve  # noqa: E402
from lowtide.models.gguf.spec import read_spec  # noqa: E402
from lowtide.models.spec import ModelSpec  # noqa: E402


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(
        "lowtide.attention.calibration.calibration_folder", lambda: tmp_path / "calibrations"
    )


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return resolve("smollm2")


@pytest.fixture(scope="session")
def smollm2_spec(smollm2: Path) -> ModelSpec:
    return read_spec(smollm2)


@pytest.fixture(scope="session")
def real_runtime(smollm2: Path):  # type: ignore[no-untyped-def]
    with Runtime.open(smollm2, memory="8GiB", context=2048) as runtime:
        yield runtime


@pytest.fixture
def fake_runtime() -> Callable[..., Runtime]:
    def opened(*replies: str, context: int = 512, batch_size: int = 64) -> Runtime:
        model = FakeModel(replies or ("Hello.",), context=context, batch_size=batch_size)
        runtime = Runtime.open(model, memory="8GiB")
        runtime.fake = model  # type: ignore[attr-defined]
        return runtime

    return opened
