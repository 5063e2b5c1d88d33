"""`lowtide run`, as typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Invoke = Callable[..., Result]


def test_only_the_answer_is_on_stdout(lowtide: Invoke) -> None:
    done = lowtide("run", "-p", "Hi", replies=("The answer 😀",))
    assert (done.exit_code, done.stdout) == (0, "The answer 😀\n")
    assert "planned" in done.stderr and "13 tokens" not in done.stdout
    assert "reused" in done.stderr


def test_the_prompt_from_stdin_or_a_file(lowtide: Invoke, tmp_path: Path) -> None:
    assert lowtide("run", input="Hi").stdout == "Hello.\n"
    file = tmp_path / "prompt.txt"
    file.write_text("Hi")
    assert lowtide("run", "-f", str(file)).stdout == "Hello.\n"


def test_json_is_one_documented_object(lowtide: Invoke) -> None:
    done = lowtide("run", "-p", "Hi", "--json", "--seed", "4")
    values = json.loads(done.stdout)
    assert set(values) == {
        "version",
        "model",
        "machine",
        "text",
        "tokens",
        "finish_reason",
        "stats",
        "kernels",
        "engine_kernels_reason",
        "quality",
    }
    assert (values["text"], values["finish_reason"]) == ("Hello.", "stop")
    assert bytes(values["tokens"]) == b"Hello."
    assert {
        "prompt_tokens",
        "reused_tokens",
        "retained_tokens",
        "prefill_s",
        "decode_tokens_per_s",
        "time_to_first_token_s",
        "peak_rss_bytes",
        "layers_native",
        "layers",
        "speculation",
    } <= set(values["stats"])
    assert values["stats"]["seed"] == 4
    assert values["machine"]["cores"] >= 1


def test_options_reach_the_generation(lowtide: Invoke) -> None:
    short = lowtide("run", "-p", "Hi", "-n", "3")
    assert short.stdout == "Hel\n" and "stopped at --max-tokens" in short.stderr
    assert lowtide("run", "-p", "Hi", "--stop", "lo").stdout == "Hel\n"
    assert lowtide("run", "-p", "Hi", "-n", "-1").stdout == "Hello.\n"
    assert lowtide("run", "-p", "Hi\n", "--raw").stdout == "Hello.\n"


def test_the_json_has_log_probabilities(lowtide: Invoke) -> None:
    done = lowtide(
        "run", "-p", "Hi", "--temp", "0", "--json", "--logprobs", "2", "--logit-bias", "72=-100"
    )
    answer = json.loads(done.stdout)
    assert [one["token_id"] for one in answer["logprobs"]] == answer["tokens"]
    assert "H" not in answer["text"]
    first = answer["logprobs"][0]
    assert first["top_logprobs"][0]["token"] == "H" and first["logprob"] < -1
    assert len(first["top_logprobs"]) == 2


def test_a_system_message_comes_first(lowtide: Invoke) -> None:
    lowtide("run", "-p", "Hi", "-s", "Be brief.")
    model = lowtide.models[-1]  # type: ignore[attr-defined]
    assert model.tokenizer.decode(model._tokens).startswith("system\nBe brief.\nuser\nHi\n")


WRONG = {
    "no such option": (["-p", "x", "--heat", "3"], "No such option"),
    "two prompts": (["-p", "x", "-f", "y"], "--prompt and --file exclude each other"),
    "missing file": (["-f", "nothing.txt"], "cannot read nothing.txt"),
    "a folder": (["-f", "/"], "cannot read /"),
    "bad temperature": (["-p", "x", "--temp", "-1"], "--temp is -1"),
    "bad count": (["-p", "x", "-n", "0"], "--max-tokens is 0"),
    "bad window": (["-p", "x", "--repeat-last-n", "-1"], "--repeat-last-n is -1"),
    "bad penalty": (["-p", "x", "--frequency-penalty", "3"], "--frequency-penalty is 3"),
    "bad bias": (["-p", "x", "--logit-bias", "5"], "write a token's id, = and a number"),
    "bias of no token": (["-p", "x", "--logit-bias", "many=1"], "--logit-bias is 'many'"),
    "logprobs without JSON": (["-p", "x", "--logprobs", "2"], "add --json"),
    "bad number": (["-p", "x", "--top-k", "many"], "is not a valid integer"),
    "bad context": (["-p", "x", "-c", "99999"], "was trained for 512"),
    "system without template": (
        ["-p", "x", "--raw", "-s", "y"],
        "--system needs the chat template",
    ),
    "raw prompt beyond the context": (
        ["-p", "y" * 600, "--raw"],
        "601 tokens but the context holds 512",
    ),
    "two models": (["a.gguf", "-m", "b.gguf", "-p", "x"], "two models are named"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_one_sentence_and_exit_code_2(name: str, lowtide: Invoke) -> None:
    arguments, expected = WRONG[name]
    done = lowtide("run", *arguments)
    assert done.exit_code == 2
    assert expected in done.stderr
    assert done.stdout == ""


def test_the_error_of_invalid_utf_8_has_the_position(lowtide: Invoke) -> None:
    done = lowtide("run", input=b"caf\xe9 au lait")
    assert done.exit_code == 2
    assert "standard input is not UTF-8 at byte 3" in done.stderr


def test_a_huge_prompt_is_not_read_completely(lowtide: Invoke) -> None:
    done = lowtide("run", input=b"x" * 5_000_000)
    assert done.exit_code == 2
    assert "the context holds 512" in done.stderr


def test_the_answer_until_a_failure_is_printed(
    lowtide: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowtide import FakeModel
    from lowtide.models.errors import ForwardError

    forward = FakeModel.forward

    def fail(self: FakeModel, token_ids: list[int]) -> object:
        if len(token_ids) == 1 and self.num_tokens > 22:
            raise ForwardError("a forward pass failed: no reason")
        return forward(self, token_ids)

    monkeypatch.setattr(FakeModel, "forward", fail)
    done = lowtide("run", "-p", "Hi")
    assert done.exit_code == 1
    assert done.stdout.startswith("H") and "Error: a forward pass failed" in done.stderr


def test_a_raw_prompt_may_spell_control_tokens(lowtide: Invoke) -> None:
    prompt = ("run", "--raw", "--json", "-p", "<|start|>user\nHi<|end|>\n<|start|>assistant\n")
    as_text, parsed = lowtide(*prompt), lowtide(*prompt, "--special")
    assert as_text.stderr.count("--special parses them") == 1 and "--special" not in parsed.stderr
    num_as_text, num_parsed = (
        json.loads(done.stdout)["stats"]["prompt_tokens"] for done in (as_text, parsed)
    )
    assert (num_as_text, num_parsed) == (1 + 25 + 18, 1 + 3 + 18)
    assert "--special" not in lowtide("run", "--raw", "-p", "Hi <|en").stderr


def test_special_is_for_raw_prompts(lowtide: Invoke) -> None:
    done = lowtide("run", "--special", "-p", "Hi")
    assert done.exit_code == 2 and "add --raw" in done.stderr
