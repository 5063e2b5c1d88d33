"""Texts that are too long: their true size, and only hints that help."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from gguf_files import write_model
from processes import Finished, run_lowtide, run_measured

from lowtide.models.gguf.header.file_types import file_type_name
from lowtide.runtime.errors import PromptTooLong


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model") / "m.gguf", context=1024))


def refused(done: Finished) -> str:
    assert done.code == 2 and not done.stdout, done.stderr
    assert done.stderr.count("\n") <= 1
    return done.stderr


@pytest.mark.parametrize("how", ["file", "-", "stdin"])
def test_the_size_is_that_of_the_whole_text(model: str, tmp_path: Path, how: str) -> None:
    path, text = tmp_path / "long.txt", b"tide " * 128_800
    path.write_bytes(text)
    source = {"file": ["-f", str(path)], "-": ["-f", "-"], "stdin": []}[how]
    arguments = ["run", model, "--raw", "-n", "2", "--memory", "200MiB", *source]
    error = refused(run_lowtide(*arguments, stdin=text))
    assert "about 161,000 tokens but the context holds 1,024; shorten the prompt, or use a" in error
    assert "--context" not in error and "--overflow" not in error
    shorter = refused(run_lowtide(*arguments, "-c", "512", stdin=text))
    assert "the context holds 512; shorten the prompt, or raise --context" in shorter


def test_a_text_without_an_end(model: str) -> None:
    program = (
        f"yes tide 2>/dev/null | {sys.executable} -c 'from lowtide.cli.main import run; run()' "
        f"run {model} --raw --memory 200MiB"
    )
    error = refused(run_measured("/bin/sh", "-c", program))
    assert "more than about 16,7" in error


def test_a_text_that_the_budget_cannot_tokenise(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", context=1_000_000)
    error = refused(
        run_lowtide("run", str(path), "--raw", "--memory", "100MiB", stdin=b"tide " * 400_000)
    )
    assert "tokenising a prompt of 2,000,000 bytes needs at least 245 MiB" in error


def test_only_hints_that_help() -> None:
    error = PromptTooLong(2000, 1024)
    assert "raise context (and memory), or pass overflow" in str(error)
    assert "context=" not in str(error.of_model(1024)) and "raise" not in str(error.of_model(1024))
    assert "or use a model with a longer context" in str(error.of_model(1024))
    assert "raise context" in str(error.of_model(2048))


@pytest.mark.parametrize(
    ("number", "types", "name"),
    [
        (15, {"Q5_0", "Q8_0", "Q4_K", "Q6_K", "F32"}, "Q4_K_M"),
        (3, {"Q4_1", "F32"}, "Q4_1"),
        (27, {"IQ3_S", "F32"}, "IQ3_M"),
        (1, {"F16", "F32"}, "F16"),
        (3, {"F16", "F32"}, None),
        (1024, {"F16"}, None),
        ("15", {"Q4_K"}, None),
        (None, {"Q4_K"}, None),
    ],
)
def test_a_file_has_its_own_name_of_its_type(
    number: object, types: set[str], name: str | None
) -> None:
    assert file_type_name(number, types) == name
