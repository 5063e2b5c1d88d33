"""--chat-template and --template-arg, as typed; and models without a template in the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from gguf_files import write_model
from processes import run_lowtide

from lowtide import Runtime
from lowtide.cli.main import main
from lowtide.models.errors import BadOption, TemplateError
from lowtide.models.fake_model import CHAT_TEMPLATE, FakeModel

SHOWN = "{% for m in messages %}{{ m.content }}{% endfor %}{{ flag is false }}{{ word }}{{ tools is none }}"
CALLS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": {{ c.function.name | tojson }}, "arguments": {{ c.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "random.gguf"
    return str(write_model(path, chat_template=CHAT_TEMPLATE, context=4096))


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


@pytest.mark.parametrize("command", ["run", "chat", "profile", "evaluate", "calibrate", "bench"])
@pytest.mark.parametrize("stated", ["thinking", "=1", "a b=1"])
def test_a_template_argument_has_a_name_and_a_value(command: str, stated: str, model: str) -> None:
    done = invoke(command, model, "--template-arg", stated)
    assert done.exit_code == 2
    assert f"--template-arg is '{stated}': write a name, = and a value" in done.stderr


def test_raw_takes_no_template(model: str) -> None:
    done = invoke("run", model, "--raw", "-p", "x", "--template-arg", "a=1")
    assert done.exit_code == 2
    assert "which --raw skips" in done.stderr


def test_a_template_of_ones_own(model: str, tmp_path: Path) -> None:
    """The template refuses, and its message shows the arguments and the default of `tools`."""
    file = tmp_path / "own.jinja"
    file.write_text("\ufeff{{ raise_exception('%s %s %s' % (flag, word, n)) }}", encoding="utf-8")
    stated = ("--template-arg", "flag=false", "--template-arg", "word=a b", "--template-arg", "n=3")
    done = run_lowtide("run", model, "-p", "Hi", "--chat-template", str(file), *stated)
    assert done.code == 2
    assert "the chat template refuses these messages: False a b 3" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "--windows", "1", "-c", "512", "--attention", "tidal:k=128,layers=1"),
        ("evaluate", "--windows", "1", "-c", "3000", "--attention", "gem:k=100,layer=1"),
        ("calibrate", "-c", "1024"),
        ("bench", "--speculate", "ngram", "--rounds", "1", "-n", "2"),
    ],
    ids=["evaluate", "evaluate gem", "calibrate", "bench"],
)
def test_a_template_of_ones_own_where_questions_are_asked(
    command: tuple[str, ...], model: str, tmp_path: Path
) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ raise_exception('word is %s' % word) }}")
    name, *rest = command
    stated = ("--chat-template", str(file), "--template-arg", "word=tide")
    done = run_lowtide(name, model, "--memory", "1GiB", "-t", "1", *rest, *stated)
    assert done.code == 2
    assert "the chat template refuses these messages: word is tide" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_benchmark_of_depths_takes_no_template(model: str) -> None:
    done = invoke("bench", model, "--template-arg", "a=1")
    assert done.exit_code == 2 and "need --speculate" in done.stderr


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "which cannot be read: No such file"), (b"\xff", "is not UTF-8 at byte 0")],
)
def test_a_template_that_cannot_be_read(
    content: bytes | None, expected: str, model: str, tmp_path: Path
) -> None:
    file = tmp_path / "own.jinja"
    if content is not None:
        file.write_bytes(content)
    done = run_lowtide("run", model, "-p", "Hi", "--chat-template", str(file))
    assert done.code == 2
    assert expected in done.stderr


def test_a_family_is_used_and_named(tmp_path: Path) -> None:
    control = ("<start_of_turn>", "<end_of_turn>")
    path = write_model(tmp_path / "plain.gguf", control=control)
    done = run_lowtide("run", str(path), "-p", "Hi", "-n", "2")
    assert done.code == 0
    assert "random has no chat template of its own: using that of Gemma." in done.stderr


def test_half_of_a_familys_markers_is_no_family(tmp_path: Path) -> None:
    path = write_model(tmp_path / "plain.gguf", control=("<start_of_turn>",))
    done = run_lowtide("run", str(path), "-p", "Hi", "-n", "2")
    assert done.code == 2
    assert "no chat template" in done.stderr
    assert "--chat-template" in done.stderr


def test_a_runtime_takes_a_template_tools_and_arguments() -> None:
    with Runtime.open(FakeModel(), chat_template=CALLS + SHOWN) as runtime:
        assert runtime.spec.chat_template == CALLS + SHOWN
        assert runtime.template_family is None
        messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
        lengths = []
        for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
            asked = runtime.submit(
                messages, max_tokens=1, tools=tools, template_arguments={"flag": False, "word": "w"}
            )
            lengths.append(asked.result().stats.prompt_tokens)
        assert lengths[1] == lengths[0] + len("False") - len("True")


@pytest.mark.parametrize("value", [5, b"x", ["x"]])
def test_a_chat_template_is_a_text_or_a_path(value: object) -> None:
    with pytest.raises(BadOption, match="chat_template is .*: pass the text of a template"):
        Runtime.open(FakeModel(), chat_template=value)


def test_a_template_that_does_not_parse_is_one_sentence() -> None:
    with (
        Runtime.open(FakeModel(), chat_template="{% for %}") as runtime,
        pytest.raises(TemplateError, match="does not parse at line 1"),
    ):
        list(runtime.chat([{"role": "user", "content": "Hi"}]))
