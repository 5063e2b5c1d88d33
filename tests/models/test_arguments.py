"""Names and values of options as callers write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowtide.models.arguments.names import on_command_line, option
from lowtide.models.arguments.paths import user_path
from lowtide.models.arguments.text_files import decoded
from lowtide.models.errors import BadOption


def test_an_option_is_written_as_its_caller_writes_it() -> None:
    assert option("top_p") == "top_p"
    assert option("attention", "tidal") == "attention='tidal'"
    with on_command_line({"top_p": "--top-p", "repack": "--repack", "attention": "-a"}.get):
        assert option("top_p") == "--top-p"
        assert option("attention", "tidal") == "-a tidal"
        assert option("repack", True) == "--repack"
        assert option("batch_size") == "batch_size"  # the command has no such option
    assert option("repack", True) == "repack=True"


@pytest.mark.parametrize("value", [5, 1.5, None, b"a\0b", "a\0b", "", "x" * 5000, "a/" * 2048])
def test_what_is_no_path_is_refused(value: object) -> None:
    with pytest.raises(BadOption, match="^model is ") as refused:
        user_path("model", value)
    assert len(str(refused.value)) < 200


def test_the_home_of_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/one")
    assert user_path("model", "~/x.gguf") == Path("/home/one/x.gguf")
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr("lowtide.models.files.folders._listed_home", lambda: "")
    assert user_path("model", "~/x.gguf") == Path("~/x.gguf")
    assert user_path("model", b"/x.gguf") == Path("/x.gguf")


def test_text_is_utf_8_with_or_without_a_mark() -> None:
    assert decoded(b"\xef\xbb\xbfHi", "x") == decoded(b"Hi", "x") == "Hi"
    assert decoded(b"zwei\0", "x") == "zwei\0"
    assert decoded("ä".encode()[:1], "x", is_cut=True) == ""
    with pytest.raises(BadOption, match="not UTF-8 at byte 3"):
        decoded(b"\xef\xbb\xbf\xff", "x")
