"""Batches over the fake model: each answer is that of its prompt alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lowtide import FakeModel, OverBudget, PromptTooLong, Runtime, SamplingParams
from lowtide.memory.plan.line import BATCH
from lowtide.models.errors import BadOption, ForwardError
from lowtide.models.fake_model import FakeSequences
from lowtide.runtime.errors import RuntimeUnusable

Opened = Callable[..., Runtime]
PREFIX = "A text that all of them begin with. "
PROMPTS = [PREFIX + end + "\n" for end in ("one", "two, and more of it", "", "three")]


def test_each_answer_is_that_of_its_prompt_alone(fake_runtime: Opened) -> None:
    runtime = fake_runtime("The answer is 42.")
    for options in ({"temperature": 0}, {"temperature": 1.5, "seed": 5, "repeat_penalty": 1.2}):
        alone = [runtime.generate(prompt, **options) for prompt in PROMPTS]  # type: ignore[arg-type]
        together = runtime.generate_batch(PROMPTS, **options)
        for one, other in zip(alone, together, strict=True):
            assert (one.text, one.token_ids) == (other.text, other.token_ids)
            assert one.finish_reason == other.finish_reason
            assert one.stats.prompt_tokens == other.stats.prompt_tokens
            assert one.stats.generated_tokens == other.stats.generated_tokens
            assert other.stats.batch is not None and other.stats.batch["identical"]


def test_the_shared_prefix_is_computed_once_and_a_pass_gives_each_a_token(
    fake_runtime: Opened,
) -> None:
    runtime = fake_runtime("abc")
    rows = runtime.fake.rows  # type: ignore[attr-defined]
    results = runtime.generate_batch(PROMPTS, temperature=0)
    shared = len("^" + PREFIX)
    lengths = [len("^" + prompt) for prompt in PROMPTS]
    # The first prompt is read, then the ends of the others beside its second token.
    ends = sum(length - shared for length in lengths[1:])
    assert rows == [lengths[0], ends + 1, 4, 4, 3]
    assert [result.stats.reused_tokens for result in results] == [0, *[shared] * 3]
    assert [result.stats.prompt_tokens for result in results] == lengths


def test_prompts_longer_than_a_pass(fake_runtime: Opened) -> None:
    runtime = fake_runtime("abc", batch_size=8)
    results = runtime.generate_batch(PROMPTS, temperature=0)
    assert [result.text for result in results] == ["abc"] * 4
    assert max(runtime.fake.rows) == 8  # type: ignore[attr-defined]


def test_each_has_its_own_length_stop_texts_and_sampling(fake_runtime: Opened) -> None:
    runtime = fake_runtime("abc END def")
    options = [
        SamplingParams(max_tokens=2, temperature=0),
        SamplingParams(stop=("END",), seed=3),
        SamplingParams(temperature=0),
        SamplingParams(max_tokens=None, stop=("f",), temperature=0),
    ]
    results = runtime.generate_batch(PROMPTS, options)
    found = [(result.text, result.finish_reason) for result in results]
    whole = ("abc END def", "stop")
    assert found == [("ab", "length"), ("abc ", "stop"), whole, ("abc END de", "stop")]
    assert results[1].stats.seed == 3


def test_equal_prompts_one_prompt_and_none(fake_runtime: Opened) -> None:
    runtime = fake_runtime("abc")
    same = runtime.generate_batch([PROMPTS[0]] * 3, temperature=0)
    assert [result.text for result in same] == ["abc"] * 3
    assert same[1].stats.reused_tokens == same[1].stats.prompt_tokens - 1
    (one,) = runtime.generate_batch(PROMPTS[:1], temperature=0)
    assert (one.text, one.stats.reused_tokens) == ("abc", 0)
    assert runtime.generate_batch([]) == []


def test_a_full_context_ends_that_sequence_alone(fake_runtime: Opened) -> None:
    runtime = fake_runtime("x" * 500, context=64)
    long, short = "y" * 50 + "\n", "\n"
    results = runtime.generate_batch([long, short], temperature=0, max_tokens=30)
    alone = [runtime.generate(p, temperature=0, max_tokens=30) for p in (long, short)]
    assert [r.finish_reason for r in results] == ["context", "length"]
    assert [r.token_ids for r in results] == [r.token_ids for r in alone]


def test_closing_the_iterator_leaves_the_runtime_usable(fake_runtime: Opened) -> None:
    runtime = fake_runtime("abcdef")
    before = dict(runtime.ledger.components)
    chunks = runtime.stream_batch(PROMPTS, temperature=0)
    assert [next(chunks)[0] for _ in range(6)] == [0, 1, 2, 3, 0, 0]
    assert runtime.ledger.components[BATCH] > 0
    chunks.close()
    assert dict(runtime.ledger.components) == before
    assert runtime.generate(PROMPTS[0], temperature=0).text == "abcdef"


def test_another_answer_ends_a_batch_and_its_memory_is_released(fake_runtime: Opened) -> None:
    runtime = fake_runtime("abcdef")
    chunks = runtime.stream_batch(PROMPTS, temperature=0)
    next(chunks)
    assert runtime.generate(PROMPTS[0], temperature=0).text == "abcdef"
    assert BATCH not in runtime.ledger.components
    with pytest.raises(RuntimeUnusable, match="was ended by another answer"):
        next(chunks)
    again = runtime.stream_batch(PROMPTS, temperature=0)
    next(again)
    runtime.close()
    with pytest.raises(RuntimeUnusable, match="closed"):
        next(again)


def test_a_pass_that_fails_ends_the_batch_alone(
    fake_runtime: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = fake_runtime("abc")

    def fail(*_: object) -> None:
        raise ForwardError("it failed")

    with monkeypatch.context() as patch:
        patch.setattr(FakeSequences, "forward", fail)
        with pytest.raises(ForwardError, match="it failed"):
            runtime.generate_batch(PROMPTS)
    assert BATCH not in runtime.ledger.components
    assert runtime.generate_batch(PROMPTS, temperature=0)[3].text == "abc"


def test_a_chat_goes_on_after_a_batch(fake_runtime: Opened) -> None:
    runtime = fake_runtime("One.", "Two.")
    turns = [{"role": "user", "content": "a"}]
    answer = "".join(chunk.text for chunk in runtime.chat(turns, temperature=0))
    runtime.generate_batch(PROMPTS, temperature=0)
    turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": "b"}]
    *_, last = runtime.chat(turns, temperature=0)
    assert last.stats.reused_tokens > 10


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("one text", {}, "prompts is a single text"),
        (["a", 5], {}, "not a text"),
        (["a"], {"params": [SamplingParams()] * 2}, "2 parameter sets for 1 prompts"),
        (["a"], {"heat": 1}, "unknown sampling parameter 'heat'"),
        (["a"] * 65, {}, "more than the 64 tokens of a pass"),
    ],
)
def test_wrong_arguments_compute_nothing(
    fake_runtime: Opened, prompts: list[str], options: dict[str, object], message: str
) -> None:
    runtime = fake_runtime()
    with pytest.raises(BadOption, match=message):
        runtime.generate_batch(prompts, **options)  # type: ignore[arg-type]
    assert runtime.fake.rows == []  # type: ignore[attr-defined]


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_computed(
    fake_runtime: Opened,
) -> None:
    runtime = fake_runtime(context=64)
    with pytest.raises(PromptTooLong, match="the context holds 64"):
        runtime.generate_batch(["short", "x" * 100])
    assert runtime.fake.rows == []  # type: ignore[attr-defined]
    cut = runtime.generate_batch(
        ["short\n", "x" * 100 + "\n"], overflow="drop-oldest", temperature=0
    )
    assert cut[1].stats.dropped_tokens > 0 and cut[0].text == "Hello."


def test_a_model_that_runs_one_sequence_is_refused() -> None:
    class OneSequence(FakeModel):
        supports_batch = False

    with (
        Runtime.open(OneSequence(), memory="8GiB") as runtime,
        pytest.raises(BadOption, match="fake cannot run a batch of 4 prompts"),
    ):
        runtime.generate_batch(PROMPTS)


def test_a_model_whose_tokens_depend_on_the_pass_is_not_called_identical(
    fake_runtime: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeSequences, "rows_agree", lambda self: False)
    batch = fake_runtime("abc").generate_batch(PROMPTS, temperature=0)[0].stats.batch
    assert batch is not None and not batch["identical"]
    assert "round a token's result" in batch["nondeterminism"]


def test_a_batch_that_does_not_fit_reports_what_is_free(fake_runtime: Opened) -> None:
    runtime = fake_runtime("abc")
    ledger = runtime.ledger
    ledger.budget_bytes = ledger.reserved_bytes + 100_000
    with pytest.raises(OverBudget, match=r"a batch of 4 sequences.* are free") as caught:
        runtime.generate_batch(PROMPTS)
    assert caught.value.needed_bytes > ledger.budget_bytes
    assert runtime.fake.rows == [] and BATCH not in ledger.components  # type: ignore[attr-defined]
    ledger.budget_bytes = caught.value.needed_bytes
    assert runtime.generate_batch(PROMPTS, temperature=0)[0].text == "abc"
