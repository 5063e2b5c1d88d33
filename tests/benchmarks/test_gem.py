"""GemFilter: time to the first token (TTFT) of a long prompt with a question, and the quality of answers.

Times a whole prompt with llama.cpp and with gem, and a second question on a text compared with the first.
Quality: a passkey, a fact and two facts are hidden in essays. Counts the answers from the whole prompt with
exact attention, and how many of them gem gives too; for comparison, how many the whole prompt gives with
another text around the same sentences. Run with `make bench`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from essays import essays
from paired import paired
from peer import Peer

from lowtide import GenerationResult, Runtime
from lowtide.attention.dense import DenseController
from lowtide.attention.evaluation.passkeys import chat_framing
from lowtide.attention.evaluation.questions import (
    KINDS,
    Haystack,
    HiddenQuestion,
    Question,
    WholePrompt,
    ask,
    is_answered,
    questions_alone,
)
from lowtide.attention.gem.policy import Gem
from lowtide.models.catalog import resolve
from lowtide.models.model import Model
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

pytestmark = pytest.mark.benchmark

LAYERS = {"smollm2": 7, "gemma3-270m": 5}
NUM_KEYS = 4
"""How often each kind is asked, each time with another passkey."""


def hidden(model: Model, num_tokens: int, depth: float, question: Question) -> str:
    """Return essays of about `num_tokens` with the sentences hidden at `depth` and behind it."""
    text = model.tokenizer.decode(
        model.tokenizer.encode(essays(), add_special=False, parse_special=False)[:num_tokens]
    )
    for i, sentence in enumerate(question.sentences):
        at = text.index(" ", int(len(text) * (depth if i == 0 else (depth + 1) / 2)))
        text = f"{text[:at]}\n{sentence}{question.aside}\n{text[at:]}"
    return f"Read this text.\n{text}\n{question.text}"


def answer(runtime: Runtime, text: str, num_tokens: int) -> str:
    """Return the answer in a chat, or the continuation if the model has no chat template."""
    options: dict[str, Any] = {"max_tokens": num_tokens, "temperature": 0}
    if runtime.spec.chat_template is None:
        return GenerationResult.of(runtime.stream(f"{text}\n", **options)).text
    return GenerationResult.of(runtime.chat([{"role": "user", "content": text}], **options)).text


def first_token(runtime: Runtime, text: str, *, afresh: bool) -> None:
    if afresh:
        runtime.trim("moderate")
        runtime._session.clear()
    answer(runtime, text, 1)


@pytest.mark.parametrize("repack", [False, True], ids=["original", "repacked"])
@pytest.mark.parametrize(("model", "num_tokens"), [("smollm2", 7500), ("gemma3-270m", 7900)])
def test_time_to_first_token(benchmark: Any, model: str, num_tokens: int, *, repack: bool) -> None:
    path = resolve(model)
    config: dict[str, Any] = {
        "memory": "4GiB",
        "context": 8192,
        "threads": 2,
        "attention": Gem(k=512, layer=LAYERS[model], continues=True),
        "repack": repack,
    }
    with Runtime.open(path, **config) as runtime:
        text = hidden(runtime._model, num_tokens, 0.5, ask("pass key", 1))
        prompt = chat_framing(runtime._model)(text)
        token_ids = runtime._model.tokenizer.encode(prompt, add_special=True, parse_special=True)
        rows = runtime.plan.batch_size
        peer = Peer(Path(path), context=8192, batch_size=max(rows, 128), threads=2)
        paired(
            benchmark,
            f"{model}{', repacked' * repack}, first token of {len(token_ids):,}",
            lambda: first_token(runtime, text, afresh=True),
            lambda: (peer.prefill(list(token_ids)), peer.decode(1)),
            rounds=3,
        )
        peer.close()


@pytest.mark.parametrize(("model", "num_tokens"), [("smollm2", 7500), ("gemma3-270m", 7900)])
def test_a_second_question(benchmark: Any, model: str, num_tokens: int) -> None:
    question = ask("pass key", 1)
    attention = Gem(k=512, layer=LAYERS[model], continues=True)
    config: dict[str, Any] = {"memory": "4GiB", "context": 8192, "threads": 2}
    with Runtime.open(model, attention=attention, **config) as runtime:
        assert runtime.plan.cache_filter_pass
        text = hidden(runtime._model, num_tokens, 0.5, question).removesuffix(question.text)
        paired(
            benchmark,
            f"{model}, a second question on {num_tokens:,} tokens against the first",
            lambda: first_token(runtime, text + "What is this text about?", afresh=False),
            lambda: first_token(runtime, text + question.text, afresh=True),
            rounds=5,
            peer="the first",
        )


@pytest.mark.parametrize(
    ("model", "num_tokens"),
    [("smollm2", 1000), ("smollm2", 2000), ("gemma3-270m", 4000), ("gemma3-270m", 7900)],
)
def test_quality(benchmark: Any, model: str, num_tokens: int) -> None:
    """With the calibration: a text for each of four passkeys, and four other texts around them."""
    options = LoadConfig(
        memory="4GiB",
        context=num_tokens + 100,
        threads=2,
        attention=Gem(min_prompt=600),
        repack=True,
    )
    loaded = Engine(plan_reference(model, options))
    hook, prompt_filter, tokenizer = loaded.hook, loaded.prompt_filter, loaded.model.tokenizer
    assert hook is not None and prompt_filter is not None and isinstance(loaded.planned.policy, Gem)
    text = tokenizer.encode(essays(), add_special=False, parse_special=False)
    whole = WholePrompt(loaded.model, hook, loaded.planned.policy.prompt_selector.rule)
    controller, framing = DenseController(hook), chat_framing(loaded.model)
    found = {kind: [0, 0, 0] for kind in KINDS}

    def asked(seed: int, place: int) -> list[HiddenQuestion]:
        step = (len(text) - num_tokens) // (2 * NUM_KEYS - 1)
        return questions_alone(
            Haystack(tokenizer, text[place * step :], framing), (num_tokens,), seed
        )

    def answers_whole(hidden: HiddenQuestion) -> bool:
        whole.clear()
        whole.read(hidden.token_ids)
        return whole.answers(hidden)

    def count() -> None:
        for seed in range(NUM_KEYS):
            for hidden, elsewhere in zip(
                asked(seed, seed), asked(seed, NUM_KEYS + seed), strict=True
            ):
                if not answers_whole(hidden):
                    continue
                retained = prompt_filter.filtered(hidden.token_ids)
                loaded.model.truncate(0)
                counts = found[hidden.question.kind]
                counts[0] += 1
                counts[1] += is_answered(loaded.model, controller, retained, hidden)
                counts[2] += answers_whole(elsewhere)
        whole.clear()

    benchmark.pedantic(count, rounds=1)
    benchmark.extra_info.update(found)
    loaded.close()
    counts = ", ".join(
        f"{kind} {by_gem} of {whole_prompt} ({others} with another text around)"
        for kind, (whole_prompt, by_gem, others) in found.items()
    )
    print(f"\n{model} at {num_tokens:,}: gem gives the answers of the whole prompt: {counts}")
