"""Submitted answers over the fake model: joining, leaving, waiting, cancelling, failing, from threads and asyncio."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from lowtide import FakeModel, Runtime
from lowtide.memory.plan.line import BATCH
from lowtide.models.errors import BadOption, ForwardError
from lowtide.models.fake_model import FakeSequences
from lowtide.models.model import SequenceSlice
from lowtide.runtime.errors import AnswerCancelled, PromptTooLong, QueueFull, RuntimeUnusable
from lowtide.runtime.planning.plan import LoadConfig, plan_model

GREEDY: dict[str, Any] = {"temperature": 0}
REPLY = "The answer is 42."
MESSAGES = [{"role": "user", "content": "Look."}]
PROMPTS = [f"A text that all of them begin with. {i}\n" for i in range(9)]


class GatedSequences(FakeSequences):
    """Sequences whose passes wait while the gate is closed."""

    gate: threading.Event
    passes: int = 0

    def forward(self, slices: Sequence[SequenceSlice]) -> np.ndarray:  # type: ignore[type-arg]
        self.gate.wait(20)
        time.sleep(0.002)
        type(self).passes += 1
        return super().forward(slices)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """An open gate through which every pass of sequences goes."""
    gate = threading.Event()
    gate.set()
    monkeypatch.setattr(GatedSequences, "gate", gate, raising=False)
    monkeypatch.setattr(GatedSequences, "passes", 0)
    monkeypatch.setattr("lowtide.models.fake_model.FakeSequences", GatedSequences)
    return gate


def opened(*replies: str, sequences: int = 4, context: int = 512, **options: Any) -> Runtime:
    model = FakeModel(replies or (REPLY,), context=context, batch_size=64)
    runtime = Runtime.open(model, memory="8GiB", sequences=sequences, **options)
    runtime.fake = model  # type: ignore[attr-defined]
    return runtime


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.001)


@pytest.mark.parametrize("sequences", [1, 2, 4, 16])
def test_each_answer_is_that_of_its_prompt_alone(sequences: int) -> None:
    alone = opened(sequences=1)
    for options in (GREEDY, {"temperature": 1.5, "seed": 5, "repeat_penalty": 1.2}):
        runtime = opened(sequences=sequences)
        submitted = [runtime.submit(prompt, **options) for prompt in PROMPTS]
        for prompt, one in zip(PROMPTS, submitted, strict=True):
            expected, found = alone.generate(prompt, **options), one.result(20)
            assert (found.text, found.token_ids) == (expected.text, expected.token_ids)
            assert found.stats.prompt_tokens == expected.stats.prompt_tokens
            assert found.stats.batch is None or found.stats.batch["identical"]
            assert one.done and one.result() == found
        runtime.close()


def test_chunks_are_read_by_threads_and_by_asyncio_from_the_first_one_each_time() -> None:
    runtime = opened()
    chat = [{"role": "user", "content": "a"}]
    one = runtime.submit(chat, **GREEDY)
    assert "".join(chunk.text for chunk in one) == REPLY

    async def read() -> list[str]:
        others = [runtime.submit(prompt, **GREEDY) for prompt in PROMPTS[:6]]
        texts = ["".join([chunk.text async for chunk in one])]
        texts += [(await other).text for other in others[:3]]
        texts += [found.text for found in await asyncio.gather(*map(whole, others[3:]))]
        return texts

    async def whole(submission: Any) -> Any:
        return await submission

    assert asyncio.run(read()) == [REPLY] * 7
    assert "".join(chunk.text for chunk in one) == REPLY


def test_a_prefix_is_read_once_and_an_earlier_turn_never_again() -> None:
    runtime = opened("One.", "Two.", sequences=2)
    system = {"role": "system", "content": "You are a tide table. " * 4}
    first = [system, {"role": "user", "content": "a"}]
    answer = runtime.submit(first, **GREEDY).result(20)
    other = runtime.submit([system, {"role": "user", "content": "b"}], **GREEDY).result(20)
    assert other.stats.reused_tokens > len(str(system["content"]))
    turns = [
        *first,
        {"role": "assistant", "content": answer.text},
        {"role": "user", "content": "c"},
    ]
    last = runtime.submit(turns, **GREEDY).result(20)
    assert last.text == "Two."
    assert last.stats.reused_tokens >= answer.stats.prompt_tokens + len("One.")


def test_prompts_that_begin_alike_and_come_together_are_read_once(gate: threading.Event) -> None:
    runtime = opened()
    gate.clear()
    prefix = "x" * 200
    submitted = [runtime.submit(f"{prefix}{i}\n", **GREEDY) for i in range(4)]
    gate.set()
    results = [one.result(20) for one in submitted]
    reused = sorted(result.stats.reused_tokens for result in results)
    assert [result.text for result in results] == [REPLY] * 4
    assert reused == [0, 201, 201, 201]


def test_short_prompts_are_answered_while_a_long_one_is_read(gate: threading.Event) -> None:
    """The long prompt needs many passes; the short one waits for none of them but the one that runs."""
    runtime = opened(context=4096)
    long = runtime.submit("y" * 3000 + "\n", max_tokens=5, **GREEDY)
    wait_until(lambda: GatedSequences.passes > 2)
    short = runtime.submit("z\n", max_tokens=5, **GREEDY)
    assert short.result(20).text == REPLY[:5]
    assert not long.done
    assert long.result(60).text == REPLY[:5]


def test_more_answers_than_places_wait_in_order_and_no_more_than_allowed(
    gate: threading.Event,
) -> None:
    runtime = opened(sequences=2, max_waiting=3)
    gate.clear()
    submitted = [runtime.submit(prompt, **GREEDY) for prompt in PROMPTS[:5]]
    with pytest.raises(QueueFull, match="raise max_waiting") as refused:
        runtime.submit(PROMPTS[5])
    assert refused.value.exit_code == 1
    wait_until(lambda: runtime.queue.running + runtime.queue.waiting == 5)
    ended = list[int]()
    for number, one in enumerate(submitted):
        one.on_change(lambda number=number, one=one: ended.append(number) if one.done else None)
    gate.set()
    for one in submitted:
        one.result(20)
    assert ended == sorted(ended)
    figures = runtime.queue
    assert (figures.running, figures.waiting, figures.sequences) == (0, 0, 2)
    assert figures.tokens_per_s > 0 and figures.retry_after_s is not None
    assert runtime.submit(PROMPTS[5], **GREEDY).result(20).text == REPLY


@pytest.mark.parametrize("sequences", [1, 3])
def test_a_cancelled_answer_leaves_before_the_next_pass(sequences: int) -> None:
    runtime = opened("x" * 400, sequences=sequences)
    runs = runtime.submit(PROMPTS[0], max_tokens=400, **GREEDY)
    other = runtime.submit(PROMPTS[1], max_tokens=30, **GREEDY)
    next(iter(runs))
    runs.cancel()
    runs.cancel()
    with pytest.raises(AnswerCancelled, match="cancelled"):
        runs.result(20)
    with pytest.raises(AnswerCancelled):
        list(runs)
    assert other.result(20).text == "x" * 30
    waits = runtime.submit(PROMPTS[2], **GREEDY)
    waits.cancel()
    assert waits.done
    wait_until(lambda: runtime.queue.running == 0)
    assert runtime.submit(PROMPTS[3], max_tokens=3, **GREEDY).result(20).text == "xxx"


def test_a_task_that_is_cancelled_cancels_its_answer() -> None:
    runtime = opened("x" * 400)

    async def give_up() -> Any:
        submission = runtime.submit(PROMPTS[0], max_tokens=400, **GREEDY)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_awaited(submission), 0.01)
        return submission

    async def _awaited(submission: Any) -> None:
        async for _ in submission:
            await asyncio.sleep(0.002)
        await submission

    assert isinstance(asyncio.run(give_up()).error, AnswerCancelled | None)


def test_a_wait_has_an_end(gate: threading.Event) -> None:
    runtime = opened()
    gate.clear()
    waits = runtime.submit(PROMPTS[0], **GREEDY)
    with pytest.raises(TimeoutError, match=r"after 0.01 s"):
        waits.result(0.01)
    gate.set()
    assert waits.result(20).text == REPLY


@pytest.mark.parametrize("sequences", [1, 3])
def test_what_is_wrong_with_one_is_raised_there_and_hurts_nobody(sequences: int) -> None:
    runtime = opened(sequences=sequences)
    good = runtime.submit(PROMPTS[0], **GREEDY)
    long = runtime.submit("x" * 600, **GREEDY)
    bad = runtime.submit([{"role": "user", "content": 5}], **GREEDY)
    schema = {"type": "string", "minLength": 50}
    never = runtime.submit("a\n", constraint=schema, max_tokens=5, **GREEDY)
    after = runtime.submit(PROMPTS[1], **GREEDY)
    with pytest.raises(PromptTooLong, match="the context holds 512"):
        long.result(20)
    for one in (bad, never):
        with pytest.raises(Exception, match=r"\w+") as caught:
            one.result(20)
        assert "\n" not in str(caught.value)
    assert good.result(20).text == after.result(20).text == REPLY
    with pytest.raises(BadOption, match="tools and template_arguments are for messages"):
        runtime.submit("text", tools=[])
    with pytest.raises(BadOption, match="unknown sampling parameter"):
        runtime.submit("text", heat=1)
    with pytest.raises(BadOption, match="messages"):
        runtime.submit(5)  # type: ignore[arg-type]


def test_logits_that_are_no_numbers_end_their_sequence_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        FakeSequences,
        "failure",
        lambda self, logits, token_ids: ForwardError("no numbers") if 7 in token_ids else None,
    )
    runtime = opened()
    submitted = [
        runtime.submit(prompt, **GREEDY) for prompt in (*PROMPTS[:3], PROMPTS[3] + "\x07\n")
    ]
    assert [one.result(20).text for one in submitted[:3]] == [REPLY] * 3
    with pytest.raises(ForwardError, match="no numbers"):
        submitted[3].result(20)
    again = runtime.submit(PROMPTS[3], **GREEDY).result(20)
    assert again.text == REPLY


def test_a_pass_that_fails_ends_those_in_it_and_the_next_ones_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime, forward = opened(sequences=2), FakeSequences.forward
    fails = [True]

    def fail_once(self: FakeSequences, slices: Sequence[SequenceSlice]) -> Any:
        if fails:
            fails.clear()
            raise ForwardError("it failed")
        return forward(self, slices)

    monkeypatch.setattr(FakeSequences, "forward", fail_once)
    submitted = [runtime.submit(prompt, **GREEDY) for prompt in PROMPTS]
    outcomes = list[str]()
    for one in submitted:
        try:
            outcomes.append(one.result(20).text)
        except ForwardError as error:
            outcomes.append(str(error))
    assert 1 <= outcomes.count("it failed") <= 2
    assert outcomes.count(REPLY) == len(PROMPTS) - outcomes.count("it failed")


@pytest.mark.parametrize("sequences", [1, 3])
def test_closing_ends_what_is_left_or_waits_for_it(sequences: int) -> None:
    runtime = opened("x" * 400, sequences=sequences)
    submitted = [runtime.submit(prompt, max_tokens=400, **GREEDY) for prompt in PROMPTS[:4]]
    runtime.close()
    for one in submitted:
        with pytest.raises(RuntimeUnusable, match="closed"):
            one.result(20)
    with pytest.raises(RuntimeUnusable, match="closed"):
        runtime.submit("a")
    waiting = opened(sequences=sequences)
    submitted = [waiting.submit(prompt, **GREEDY) for prompt in PROMPTS]
    waiting.close(wait=True)
    assert [one.result().text for one in submitted] == [REPLY] * len(PROMPTS)


def test_threads_end_with_their_runtime_also_where_it_is_dropped() -> None:
    def num_threads() -> int:
        return sum(thread.name == "lowtide" for thread in threading.enumerate())

    before = num_threads()
    runtime = opened()
    runtime.submit(PROMPTS[0], **GREEDY).result(20)
    assert num_threads() == before + 2
    runtime.close()
    assert num_threads() == before


def test_the_cells_are_planned_and_the_ledger_counts_them() -> None:
    runtime = opened(sequences=3)
    batch = runtime.plan.batch
    assert batch is not None and batch.num_sequences == 3
    assert runtime.ledger.components[BATCH] == batch.num_bytes
    assert runtime.plan.to_dict()["sequences"] == 3
    runtime.submit(PROMPTS[0], **GREEDY).result(20)
    assert runtime.ledger.components[BATCH] == batch.num_bytes
    runtime.close()
    assert BATCH not in runtime.ledger.components


def test_other_answers_of_the_runtime_join_the_submitted_ones(gate: threading.Event) -> None:
    runtime = opened(sequences=2)
    submitted = [runtime.submit(prompt, **GREEDY) for prompt in PROMPTS]
    assert runtime.generate(PROMPTS[0], **GREEDY).text == REPLY
    assert [r.text for r in runtime.generate_batch(PROMPTS, **GREEDY)] == [REPLY] * len(PROMPTS)
    assert "".join(chunk.text for chunk in runtime.chat("a", **GREEDY)) == REPLY
    chunks = runtime.stream_batch(PROMPTS, **GREEDY)
    next(chunks)
    chunks.close()
    assert [one.result(20).text for one in submitted] == [REPLY] * len(PROMPTS)
    assert runtime.trim("complete") >= 0


def test_an_answer_that_is_read_is_ended_by_a_submitted_one_in_the_same_cache() -> None:
    runtime = opened(sequences=1)
    chunks = runtime.stream(PROMPTS[0], **GREEDY)
    next(chunks)
    assert runtime.submit(PROMPTS[1], **GREEDY).result(20).text == REPLY
    with pytest.raises(RuntimeUnusable, match="ended by another answer"):
        next(chunks)


def test_a_model_that_computes_one_sequence_is_refused_where_several_are_asked_for() -> None:
    class OneSequence(FakeModel):
        supports_batch = False

    with pytest.raises(BadOption, match="fake cannot run 4 answers together"):
        plan_model(OneSequence(), LoadConfig(memory="8GiB", sequences=4))  # nothing is loaded yet
    with pytest.raises(BadOption, match="fake cannot run 4 answers together"):
        Runtime.open(OneSequence(), memory="8GiB", sequences=4)
    gc.collect()  # nothing is left that would warn
    with pytest.raises(BadOption, match="sequences is 0"):
        Runtime.open(FakeModel(), memory="8GiB", sequences=0)


def test_many_threads_submit_cancel_and_read_at_once() -> None:
    runtime = opened(sequences=3, max_waiting=500)
    wrong = list[object]()

    def work(number: int) -> None:
        for i in range(10):
            one = runtime.submit(f"{number} {i}\n", **GREEDY)
            if (number + i) % 3 == 0:
                one.cancel()
            try:
                text = one.result(60).text
            except AnswerCancelled:
                continue
            if text != REPLY:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and runtime.queue.running + runtime.queue.waiting == 0


def look(at: str) -> str:
    """Look at something."""
    return at


def answer_to_tools(runtime: Runtime, *, submits: bool, **options: Any) -> str:
    asked: dict[str, Any] = {"tools": [look], "max_tokens": 200, **GREEDY, **options}
    if submits:
        return runtime.submit(MESSAGES, **asked).result(20).text
    return "".join(chunk.text for chunk in runtime.chat(MESSAGES, **asked))


@pytest.mark.parametrize("sequences", [1, 3])
def test_tools_are_those_of_a_chat(sequences: int) -> None:
    pytest.importorskip("llguidance")
    for choice in ("auto", "none", "required", "look"):
        texts = []
        for submits in (False, True):
            with opened(sequences=sequences, context=2048) as runtime:
                texts.append(answer_to_tools(runtime, submits=submits, tool_choice=choice))
                prompt = runtime.fake.tokenizer.decode(runtime.fake._tokens)  # type: ignore[attr-defined]
                assert sequences > 1 or ("Look at something." in prompt) is (choice != "none")
        assert texts[0] == texts[1]
        assert ('"name": "look"' in texts[0]) is (choice in ("required", "look"))


@pytest.mark.parametrize("submits", [False, True])
def test_wrong_tools_are_refused(submits: bool) -> None:
    with opened() as runtime:
        with pytest.raises(BadOption, match="it must be a function"):
            answer_to_tools(runtime, submits=submits, tools=[None])
        with pytest.raises(BadOption, match="tool_choice needs tools"):
            answer_to_tools(runtime, submits=submits, tools=None, tool_choice="required")
