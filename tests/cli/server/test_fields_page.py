"""`docs/server.md` names every field that the server ignores or refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("starlette")

from lowtide.cli.server.ollama import answers
from lowtide.cli.server.openai import chat, completions, responses

PAGE = Path(__file__).resolve().parents[3] / "docs/server.md"


@pytest.mark.parametrize(
    ("heading", "names"),
    [
        ("change nothing", chat.IGNORED),
        ("change nothing", responses.IGNORED),
        ("change nothing", answers.IGNORED_OPTIONS),
        ("are refused", chat.REFUSED),
        ("are refused", completions.REFUSED),
        ("are refused", responses.REFUSED),
        ("are refused", answers.REFUSED),
        ("are refused", answers.REFUSED_OPTIONS),
    ],
)
def test_the_page_names_them(heading: str, names: list[str]) -> None:
    table = PAGE.read_text(encoding="utf-8").partition(f"| where | fields that {heading} |")[2]
    table = table.partition("\n\n")[0]
    assert names and [name for name in names if f"`{name}`" not in table] == []
