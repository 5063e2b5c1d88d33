from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from saved_talk import MESSAGES, TURNS, chat

from lowtide import Runtime


@pytest.fixture
def saved(fake_runtime: Callable[..., Runtime], tmp_path: Path) -> Path:
    runtime = fake_runtime("One.", "Two.")
    chat(runtime, TURNS)
    written = runtime.saved_chats.save(tmp_path / "talk", MESSAGES)
    assert written.num_tokens == runtime.fake.num_tokens  # type: ignore[attr-defined]
    assert written.num_bytes == (tmp_path / "talk").stat().st_size
    return tmp_path / "talk"
