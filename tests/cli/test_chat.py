"""`lowtide chat` by transcripts: input, output, and what the model reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from lowtide import FakeModel

Invoke = Callable[..., Result]


def prompts(lowtide: Invoke) -> str:
    """Return the text in the model's KV cache."""
    model = lowtide.models[-1]  # type: ignore[attr-defined]
    return model.tokenizer.decode(model._tokens)


def test_several_turns_through_a_pipe(lowtide: Invoke) -> None:
    done = lowtide("chat", input="Hi\nHow are you?\n/exit\nnot reached\n", replies=("One.", "Two."))
    assert (done.exit_code, done.stdout) == (0, "One.\nTwo.\n")
    assert prompts(lowtide).startswith("user\nHi\nassistant\nOne.\nuser\nHow are you?\nassistant\n")
    assert "not reached" not in prompts(lowtide)
    assert len(done.stderr.strip().splitlines()) == 3  # the plan, and one line per answer


def test_the_second_turn_reuses_the_first(lowtide: Invoke) -> None:
    done = lowtide("chat", input="Hi\nMore\n", replies=("One.", "Two."))
    assert done.stdout == "One.\nTwo.\n"
    model = lowtide.models[-1]  # type: ignore[attr-defined]
    assert sum(model.rows) == model.num_tokens  # no token was computed twice


def test_an_earlier_conversation_is_restored_from_the_prefix_cache(lowtide: Invoke) -> None:
    system = "Be brief. " * 20
    turns = f"/system {system}\nHi\n/system Count.\nHi\n/system {system}\nHi\n/stats\n"
    done = lowtide("chat", "--prefix-cache", "1MiB", input=turns)
    assert (done.exit_code, done.stdout) == (0, "Hello.\n" * 3)
    first, _, again, *_ = (line for line in done.stderr.splitlines() if "reused" in line)
    assert "0 reused ·" in first and "from the prefix cache" not in first
    num_tokens = again.split("prompt ")[1].split(",")[0]
    assert f"prompt {num_tokens}, {int(num_tokens) - 1} reused (from the prefix cache)" in again
    assert "prefix cache" in done.stderr.split("(from the prefix cache)")[1]  # the line of the plan
    model = lowtide.models[-1]  # type: ignore[attr-defined]
    assert model.rows.count(1) > 3 * len("Hello.")  # generated tokens, and one of the last prompt


@pytest.mark.parametrize("size", ["much", "50%", "-1", "0MiB"])
def test_an_invalid_size_of_the_prefix_cache_is_refused(lowtide: Invoke, size: str) -> None:
    done = lowtide("chat", "--prefix-cache", size, input="Hi\n")
    assert done.exit_code == 2 and done.stdout == "" and not lowtide.models  # type: ignore[attr-defined]
    assert size in done.stderr and "Traceback" not in done.stderr


def test_the_end_of_input_ends_the_chat(lowtide: Invoke) -> None:
    assert lowtide("chat", input="").exit_code == 0
    assert lowtide("chat", input="\n\n  \n").stdout == ""


def test_multi_line_turns(lowtide: Invoke) -> None:
    lowtide("chat", input='"""\nline one\n\nline two\n"""\n')
    assert "user\nline one\n\nline two\n" in prompts(lowtide)
    lowtide("chat", input='"""one line"""\n')
    assert "user\none line\n" in prompts(lowtide)
    lowtide("chat", input="first \\\nsecond\n")
    assert "user\nfirst \nsecond\n" in prompts(lowtide)
    lowtide("chat", input='"""\nnever closed')
    assert "user\nnever closed\n" in prompts(lowtide)


def test_help_and_stats_are_printed_on_stderr(lowtide: Invoke) -> None:
    done = lowtide("chat", input="/help\nHi\n/stats\n")
    assert done.stdout == "Hello.\n"
    assert "/save FILE" in done.stderr and "KV cache" in done.stderr


def test_reset_keeps_the_system_message(lowtide: Invoke) -> None:
    done = lowtide("chat", "-s", "Be brief.", input="first\n/reset\nsecond\n")
    assert done.exit_code == 0
    assert prompts(lowtide).startswith("system\nBe brief.\nuser\nsecond\n")
    assert "first" not in prompts(lowtide)


def test_system_starts_a_new_conversation(lowtide: Invoke) -> None:
    lowtide("chat", input="first\n/system Be kind.\nsecond\n")
    assert prompts(lowtide).startswith("system\nBe kind.\nuser\nsecond\n")
    lowtide("chat", "-s", "x", input="/system\nsecond\n")
    assert prompts(lowtide).startswith("user\nsecond\n")


def test_an_unknown_command_is_not_sent_to_the_model(lowtide: Invoke) -> None:
    done = lowtide("chat", input="/sing\n/etc/passwd is a path\n")
    assert "Unknown command /sing. Type /help for the list." in done.stderr
    assert "sing" not in prompts(lowtide)
    assert "/etc/passwd is a path" in prompts(lowtide)


def test_save_and_load(lowtide: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "my talk"
    done = lowtide("chat", "-s", "Be brief.", input=f"Hi\n/save {path}\n")
    num_tokens = lowtide.models[-1].num_tokens  # type: ignore[attr-defined]
    assert f"Saved 2 messages to {path}, with the KV cache of {num_tokens} tokens" in done.stderr
    again = lowtide("chat", input=f"/load {path}\nMore\n", replies=("Hello.", "More."))
    assert again.stdout == "More.\n"
    assert f"Loaded 2 messages; {num_tokens} tokens restored to the KV cache." in again.stderr
    assert f", {num_tokens} reused" in again.stderr
    assert prompts(lowtide).startswith(
        "system\nBe brief.\nuser\nHi\nassistant\nHello.\nuser\nMore\n"
    )


def test_a_conversation_without_kv_cache_is_plain_json(lowtide: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    done = lowtide("chat", "-s", "Be brief.", input=f"/save {path}\n")
    assert f"Saved 0 messages to {path}.\n" in done.stderr
    assert json.loads(path.read_text())["messages"][0]["content"] == "Be brief."
    again = lowtide("chat", input=f"/load {path}\nHi\n")
    assert "Loaded 0 messages; they are computed with your next turn." in again.stderr
    assert prompts(lowtide).startswith("system\nBe brief.\nuser\nHi\n")


def test_messages_are_computed_again_if_the_kv_cache_does_not_fit(
    lowtide: Invoke, tmp_path: Path
) -> None:
    path = tmp_path / "talk"
    lowtide("chat", input=f"{'x' * 500}\n/save {path}\n", context=1024)
    done = lowtide("chat", input=f"/load {path}\n/reset\nHi\n")
    assert "Loaded 2 messages; they are computed with your next turn, because" in done.stderr
    assert "tokens but the context holds 512; raise --context" in done.stderr
    assert (done.exit_code, done.stdout) == (0, "Hello.\n")


def test_without_room_for_the_kv_cache_only_messages_are_saved(
    lowtide: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "talk"
    monkeypatch.setattr("lowtide.runtime.sessions.store.session_bytes", lambda *_: 1 << 40)
    done = lowtide("chat", input=f"Hi\n/save {path}\nMore\n", replies=("One.", "Two."))
    assert f"Saved 2 messages to {path} without the KV cache, because session file" in done.stderr
    assert done.stdout == "One.\nTwo.\n" and done.exit_code == 0
    assert json.loads(path.read_text())["messages"][1]["content"] == "One."


def test_a_failed_save_or_load_keeps_the_conversation(lowtide: Invoke, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    script = f"Hi\n/save {tmp_path}/no/where.json\n/load {bad}\n/load\n/save\nMore\n"
    done = lowtide("chat", input=script, replies=("One.", "Two."))
    assert done.stdout == "One.\nTwo.\n"
    assert done.stderr.count("Error: ") == 4
    assert "/save needs a file name: type /save talk.session" in done.stderr
    assert "user\nHi\nassistant\nOne.\nuser\nMore\n" in prompts(lowtide)
    assert done.exit_code == 2  # with a pipe, the last failure sets the exit code


def test_the_chat_continues_after_a_turn_that_does_not_fit(lowtide: Invoke) -> None:
    done = lowtide("chat", input="x" * 300 + "\nHi\n", context=256)
    assert done.stdout == "Hello.\n"
    assert "the context holds 256" in done.stderr
    assert done.exit_code == 2
    assert "xxx" not in prompts(lowtide)


def test_drop_oldest_is_reported(lowtide: Invoke) -> None:
    turns = "".join(f"{letter * 60}\n" for letter in "abcde")
    assert lowtide("chat", input=turns, context=256).exit_code == 2
    done = lowtide("chat", "--overflow", "drop-oldest", input=turns, context=256)
    assert done.exit_code == 0
    assert "oldest tokens dropped" in done.stderr
    assert done.stdout == "Hello.\n" * 5


def test_ctrl_c_stops_the_answer_but_not_the_chat(
    lowtide: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = FakeModel.forward, iter(range(1000))

    def interrupt(self: FakeModel, token_ids: list[int]) -> object:
        logits = forward(self, token_ids)
        if next(calls) == 3:
            raise KeyboardInterrupt
        return logits

    monkeypatch.setattr(FakeModel, "forward", interrupt)
    done = lowtide("chat", input="Hi\nMore\n", replies=("A long answer.", "Two."))
    assert done.stdout == "A l\nTwo.\n"
    assert "interrupted" in done.stderr
    assert "assistant\nA l\nuser\nMore\n" in prompts(lowtide)


def test_ctrl_c_before_the_first_token(lowtide: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = FakeModel.forward, iter(range(1000))

    def interrupt(self: FakeModel, token_ids: list[int]) -> object:
        if next(calls) == 0:
            raise KeyboardInterrupt
        return forward(self, token_ids)

    monkeypatch.setattr(FakeModel, "forward", interrupt)
    done = lowtide("chat", input="Hi\nMore\n")
    assert done.stdout == "Hello.\n"
    assert "the question was removed" in done.stderr
    assert "Hi" not in prompts(lowtide)


def test_invalid_utf_8_is_an_error(lowtide: Invoke) -> None:
    done = lowtide("chat", input=b"caf\xe9\nHi\n")
    assert "not UTF-8 at byte 3" in done.stderr
    assert done.stdout == "Hello.\n"


def test_each_turn_reasons_before_its_answer(lowtide: Invoke) -> None:
    options = ("--reason", "9", "--regex", "[0-9]{2}", "--temp", "0", "-n", "40")
    done = lowtide("chat", *options, input="Hi\nMore\n", replies=("I think. 7", "Sure, so 8"))
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert [line for line in lines if line == "Answer:"] == ["Answer:"] * 2
    numbers = [lines[i + 1] for i, line in enumerate(lines) if line == "Answer:"]
    assert all(len(number) == 2 and number.isdecimal() for number in numbers)
    assert lines[0].startswith("I think") and "Answer:\n" + numbers[0] in prompts(lowtide)
    short = lowtide("chat", *options[:6], "-n", "9", input="Hi\n")
    assert short.exit_code == 2 and "its reasoning may take 9 tokens" in short.stderr
