"""What users pass as prompts, files and numbers."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Invoke = Callable[..., Result]


def prompt(lowtide: Invoke) -> str:
    model = lowtide.models[-1]  # type: ignore[attr-defined]
    return str(model.tokenizer.decode(model._tokens))


@pytest.mark.parametrize("source", ["file", "stdin", "dash"])
def test_a_byte_order_mark_is_not_part_of_the_prompt(
    lowtide: Invoke, tmp_path: Path, source: str
) -> None:
    data = codecs.BOM_UTF8 + "Grüße".encode()
    file = tmp_path / "prompt.txt"
    file.write_bytes(data)
    arguments = {"file": ("-f", str(file)), "stdin": (), "dash": ("-f", "-")}[source]
    assert lowtide("run", *arguments, input=data).exit_code == 0
    assert prompt(lowtide).startswith("user\nGrüße\n")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("source", ["file", "stdin", "text"])
def test_another_encoding_is_named(
    lowtide: Invoke, tmp_path: Path, encoding: str, source: str
) -> None:
    data = "A text of some words.".encode(encoding)
    file = tmp_path / "prompt.txt"
    file.write_bytes(data)
    command = {
        "file": ("run", "-f", str(file)),
        "stdin": ("run",),
        "text": ("profile", "--script", str(file)),
    }[source]
    done = lowtide(*command, input=data)
    assert done.exit_code == 2 and f"is {encoding[:6].upper()}, and must be UTF-8" in done.stderr
    assert "iconv" in done.stderr


@pytest.mark.parametrize("text", ["", " ", "\n\n", "\t \r\n", "\ufeff"])
@pytest.mark.parametrize("source", ["option", "file", "stdin", "raw"])
def test_a_blank_prompt_is_none(lowtide: Invoke, tmp_path: Path, text: str, source: str) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(text)
    arguments = {"option": ("-p", text), "file": ("-f", str(file)), "stdin": (), "raw": ("--raw",)}
    if source == "option" and text == "\ufeff":
        pytest.skip("a mark in an argument is a character")
    done = lowtide("run", *arguments[source], input=text)
    assert done.exit_code == 2 and "no prompt" in done.stderr
    assert not lowtide.models  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "path", ["x" * 5000, "x/" * 2500, "a\nb", "a\x1b[31mb", "~nobody-of-that-name/x", ""]
)
@pytest.mark.parametrize("command", ["run -p Hi --", "run -f", "evaluate --text", "plan", "models"])
def test_any_path_gives_a_sentence_of_one_line(
    lowtide: Invoke, monkeypatch: pytest.MonkeyPatch, path: str, command: str
) -> None:
    from lowtide.models.read_spec import read_spec

    if command == "evaluate --text" and not path:
        pytest.skip("the folder itself")
    is_model = not command.endswith(("-f", "--text"))
    words = [*command.split(), f"{path}.gguf" if is_model and path else path]
    if is_model and not path:
        pytest.skip("no model is the default model")
    if is_model:
        from click.testing import CliRunner

        from lowtide.cli.main import main

        assert read_spec
        done = CliRunner().invoke(main, words, catch_exceptions=False)
    else:
        done = lowtide(*words)
    assert done.exit_code in (1, 2)
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert done.stderr.endswith(error + "\n") and len(error) < 900
    assert "\x1b" not in error


def test_a_drawn_seed_is_shown_and_repeats_the_answer(lowtide: Invoke) -> None:
    drawn = lowtide("run", "-p", "Hi", "--seed", "-1", "--temp", "1")
    (seed,) = [part for part in drawn.stderr.split(" · ") if part.startswith("seed ")]
    chosen = lowtide("run", "-p", "Hi", "--seed", seed.removeprefix("seed "), "--temp", "1")
    assert chosen.exit_code == 0 and "seed" not in chosen.stderr
    assert chosen.stdout == drawn.stdout
    assert "seed" not in lowtide("run", "-p", "Hi", "--temp", "0").stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-n", "-5"), "--max-tokens is -5; it must be at least 1, or -1 to go on until"),
        (("-n", "0"), "--max-tokens is 0; it must be at least 1, or -1"),
        (("--seed", "-2"), "--seed is -2; it must be between 0 and"),
        (("--top-p", "5"), "--top-p is 5.0; it must be between 0 and 1"),
        (("--temp", "nan"), "--temp is nan; it must be a number"),
        (("--repeat-penalty", "0"), "--repeat-penalty is 0.0; it must be between 0.01 and 100"),
        (("--memory", "much"), "--memory"),
        (("--prefix-cache", "much"), "--prefix-cache"),
        (("--attention", "sparse"), "--attention is 'sparse'; it must be"),
        (("--speculate", "ngram:rows=4"), "--speculate is 'ngram:rows=4'"),
        (("--gpu-layers", "many"), "--gpu-layers is 'many'"),
    ],
)
def test_errors_name_options_as_they_are_typed(
    lowtide: Invoke, arguments: tuple[str, ...], says: str
) -> None:
    command = "chat" if "--prefix-cache" in arguments else "run"
    prompt = () if command == "chat" else ("-p", "Hi")
    from click.testing import CliRunner

    from lowtide.cli.main import main

    if "--memory" in arguments:
        done = CliRunner().invoke(main, [command, *prompt, *arguments])
    else:
        done = lowtide(command, *prompt, *arguments)
    assert done.exit_code == 2 and says in " ".join(done.stderr.split())


def test_exit_with_a_word_behind_it_leaves(lowtide: Invoke) -> None:
    done = lowtide("chat", input="/exit now\nnot reached\n")
    assert (done.exit_code, done.stdout) == (0, "") and "Unknown" not in done.stderr


def test_evaluate_refuses_the_engines_own_attention_before_it_plans(lowtide: Invoke) -> None:
    done = lowtide("evaluate", "--attention", "llama")
    assert done.exit_code == 2 and "planned" not in done.stderr
    assert "evaluate an approximation such as --attention tidal" in done.stderr
