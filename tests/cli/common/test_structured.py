"""The options for structured output, as typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Invoke = Callable[..., Result]
SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'


@pytest.mark.parametrize("name", ["--json-schema", "--schema"])
@pytest.mark.parametrize("from_file", [False, True])
def test_a_schema_from_a_file_or_as_text(
    lowtide: Invoke, tmp_path: Path, name: str, from_file: bool
) -> None:
    file = tmp_path / "schema.json"
    file.write_text(SCHEMA)
    done = lowtide("run", "-p", "Hi", name, str(file) if from_file else SCHEMA, "-n", "40")
    assert done.exit_code == 0 and isinstance(json.loads(done.stdout)["a"], int)


def test_the_other_formats(lowtide: Invoke, tmp_path: Path) -> None:
    grammar = tmp_path / "g.gbnf"
    grammar.write_text('root ::= "a" [0-9] "b"\n')
    assert lowtide("run", "-p", "Hi", "--choice", "yes", "--choice", "no").stdout in (
        "yes\n",
        "no\n",
    )
    assert lowtide("run", "-p", "Hi", "--choice", "yes").stdout == "yes\n"
    assert len(lowtide("run", "-p", "Hi", "--regex", "[0-9]{3}").stdout) == 4
    assert lowtide("run", "-p", "Hi", "--grammar", str(grammar)).stdout[0] == "a"
    done = lowtide(
        "run", "-p", "Hi", "--json-object", "--json-style", "compact", "-n", "20", "--json"
    )
    values = json.loads(done.stdout)
    assert isinstance(json.loads(values["text"]), dict)
    assert values["stats"]["structured"]["complete"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json-schema", '{"not": {}}'], "not at /not"),
        (["--json-schema", "missing.json"], "cannot be read"),
        (["--json-schema", "{"], "not JSON"),
        (["--grammar", "/"], "cannot be read"),
        (["--regex", "("], "unclosed group"),
        (["--choice", ""], "none of them empty"),
        (["--regex", "a", "--choice", "b"], "name one of them"),
        (["--json-style", "compact"], "add --json-schema"),
        (["--schema-check", "verified", "--regex", "a"], "add --json-schema"),
        (["--regex", "a", "--stop", "b"], "--stop is set"),
        (["--paths", "missing.tsv"], "--paths missing.tsv cannot be read"),
        (["--path-hops", "3"], "are for --paths"),
        (["--action", "a"], "--action is for --ltl"),
        (["--ltl", "F a"], "name them with --action"),
        (
            ["--ltl", "G a & F b", "--action", "a", "--action", "b"],
            "no list of the actions satisfies",
        ),
        (["--sampling", "asap", "--temp", "0"], "draws at random"),
        (["--answers", "2", "--temp", "0"], "--answers draws at random"),
        (["--answers", "2", "--sampling", "awrs"], "draws under a constraint"),
        (["--answers", "2", "--sampling", "awrs", "--regex", "a"], "add --raw"),
        (["--avoid", ""], "--avoid has an empty text"),
        (["--must", "@missing.txt"], "--must missing.txt cannot be read"),
        (["--min-words", "9", "--max-words", "2"], "--max-words is 2"),
        (["--must", "abc", "--avoid", "b"], "leave one of them out"),
        (["--regex", "a{30}", "-n", "9"], "--max-tokens is 9"),
    ],
)
def test_wrong_input_is_one_sentence(lowtide: Invoke, options: list[str], message: str) -> None:
    done = lowtide("run", "-p", "Hi", *options)
    assert done.exit_code == 2 and done.stdout == ""
    assert message in done.stderr and "Traceback" not in done.stderr


def test_rules_go_with_other_formats(lowtide: Invoke, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("b\n\nc\n")
    done = lowtide(
        "run", "-p", "Hi", "--regex", "[abc]{3}", "--avoid", f"@{words}", "--must", "aa", "--json"
    )
    values = json.loads(done.stdout)
    assert values["text"] == "aaa" and "avoided" in values["stats"]["structured"]
    done = lowtide("run", "-p", "Hi", "--max-words", "2", "--max-characters", "9", "-n", "20")
    assert done.exit_code == 0 and len(done.stdout.split()) <= 2 and len(done.stdout) <= 10


def test_paths_and_plans(lowtide: Invoke, tmp_path: Path) -> None:
    triples = tmp_path / "graph.tsv"
    triples.write_text("a\tto\tb\nb\tto\tc\n")
    done = lowtide("run", "-p", "Hi", "--paths", str(triples), "--path-only", "--path-from", "b")
    assert done.stdout == "b \u2192 to \u2192 c\n"
    done = lowtide("run", "-p", "Hi", "--ltl", "b & X last", "--action", "b", "--action", "last")
    assert done.exit_code == 0 and done.stdout.startswith("b\nlast")


@pytest.mark.parametrize("sampling", ["masked", "asap", "awrs"])
def test_several_answers(lowtide: Invoke, sampling: str) -> None:
    options = ("--regex", "[ab]{3}", "--sampling", sampling, "--answers", "3", "--seed", "1")
    done = lowtide("run", "--raw", "-p", "Hi", *options)
    assert done.exit_code == 0 and len(done.stdout.split()) == 3
    values = json.loads(lowtide("run", "--raw", "-p", "Hi", *options, "--json").stdout)
    assert [one["text"] for one in values["answers"]] == done.stdout.split()
    assert all("weight" in one["structured"] for one in values["answers"]) == (sampling == "awrs")


def test_the_plan_has_a_line_for_it(lowtide: Invoke) -> None:
    assert "structured output" in lowtide("plan", "--structured").stdout
    assert "structured output" not in lowtide("plan").stdout
