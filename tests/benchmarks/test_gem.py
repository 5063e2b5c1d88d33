"""GemFilter: time to the first token of a long prompt with a question, and what is still found.

Times a whole prompt through llama.cpp and then through gem, in turn, and the first question on a text
against a second one. What is found: a pass key, a fact, and two facts, hidden in essays; counts the answers
of the whole prompt under exact attention, and how many of these gem gives too; beside that, how many the
whole prompt gives when another text stands around the same sentences. Run with `make bench`.
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
"""Each kind is asked so often, with another key."""


def hidden(model: Model, num_tokens: int, depth: float, question: Question) -> str:
    """Essays of about so many tokens with the sentences at `depth`, and the second one after it."""
    text = model.tokenizer.decode(
        model.tokenizer.encode(essays(), add_special=False, parse_special=False)[:num_tokens]
    )
    for i, sentence in enumerate(question.sentences):
        at = text.index(" ", int(len(text) * (depth if i == 0 else (depth + 1) / 2)))
        text = f"{text[:at]}\n{sentence}{question.aside}\n{text[at:]}"
    return f"Read this text.\n{text}\n{question.text}"


def said(runtime: Runtime, text: str, num_tokens: int) -> str:
    """The answer in a chat, or what follows the text where the model knows no chat."""
    options: dict[str, Any] = {"max_tokens": num_tokens, "temperature": 0}
    if runtime.spec.chat_template is None:
        return GenerationResult.of(runtime.stream(f"{text}\n", **options)).text
    return GenerationResult.of(runtime.chat([{"role": "user", "content": text}], **options)).text


def first_token(runtime: Runtime, text: str, *, afresh: bool) -> None:
    if afresh:
        runtime.trim("moderate")
        runtime._session.forget()
    said(runtime, text, 1)


@pytest.mark.parametrize("repack", [False, True], ids=["llama.cpp's products", "packed"])
@pytest.mark.parametrize(("model", "num_tokens"), [("smollm2", 7500), ("gemma3-270m", 7900)])
def test_time_to_first_token(benchmark: Any, model: str, num_tokens: int, *, repack: bool) -> None:
    path = resolve(model)
    opening: dict[str, Any] = {
        "memory": "4GiB",
        "context": 8192,
        "threads": 2,
        "attention": Gem(k=512, layer=LAYERS[model], continues=True),
        "repack": repack,
    }
    with Runtime.open(path, **opening) as runtime:
        text = hidden(runtime._model, num_tokens, 0.5, ask("pass key", 1))
        prompt = chat_framing(runtime._model)(text)
        token_ids = runtime._model.tokenizer.encode(prompt, add_special=True, parse_special=True)
        rows = runtime.plan.batch_size
        peer = Peer(Path(path), context=8192, batch_size=max(rows, 128), threads=2)
        paired(
            benchmark,
            f"{model}{', packed' * repack}, first token of {len(token_ids):,}",
            lambda: first_token(runtime, text, afresh=True),
            lambda: (peer.prefill(list(token_ids)), peer.decode(1)),
            rounds=3,
        )
        peer.close()


@pytest.mark.parametrize(("model", "num_tokens"), [("smollm2", 7500), ("gemma3-270m", 7900)])
def test_a_second_question(benchmark: Any, model: str, num_tokens: int) -> None:
    question = ask("pass key", 1)
    attention = Gem(k=512, layer=LAYERS[model], continues=True)
    opening: dict[str, Any] = {"memory": "4GiB", "context": 8192, "threads": 2}
    with Runtime.open(model, attention=attention, **opening) as runtime:
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
def test_what_is_found(benchmark: Any, model: str, num_tokens: int) -> None:
    """As calibrated. A text for each of four keys, and four others around the same sentences."""
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

    def look() -> None:
        for seed in range(NUM_KEYS):
            for hidden, elsewhere in zip(
                asked(seed, seed), asked(seed, NUM_KEYS + seed), strict=True
            ):
                if not answers_whole(hidden):
                    continue
                kept = prompt_filter.filtered(hidden.token_ids)
                loaded.model.truncate(0)
                counts = found[hidden.question.kind]
                counts[0] += 1
                counts[1] += is_answered(loaded.model, controller, kept, hidden)
                counts[2] += answers_whole(elsewhere)
        whole.clear()

    benchmark.pedantic(look, rounds=1)
    benchmark.extra_info.update(found)
    loaded.close()
    counts = ", ".join(
        f"{kind} {ours} of {all_} ({others} with another text around)"
        for kind, (all_, ours, others) in found.items()
    )
    print(f"\n{model} at {num_tokens:,}: gem answers as the whole prompt does: {counts}")
