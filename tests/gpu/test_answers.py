"""Answers with layers on a device are those of the processor: the same tokens, or next to the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowtide import Delta, OverBudget, Runtime, Tidal
from lowtide.attention.evaluation.divergence import extend
from lowtide.models.gguf.gpu import GpuDevice

PROMPT = "The sea is salty because"
SMALL: dict[str, Any] = {"memory": "2GiB", "context": 256, "batch_size": 2, "threads": 1}
"""Few sizes of passes: a software device compiles its kernels for each."""
MOST_KL = 1e-3
MOST_KL_OF_ROUNDING = 0.02
TOKEN_IDS = [(7 * i + 3) % 300 for i in range(28)]


def logits_of(model: Path, **options: Any) -> np.ndarray:
    """Return the logits after a prompt, and after each of some more tokens."""
    with Runtime.open(model, **{**SMALL, **options}) as runtime:
        engine = runtime._engine
        extend(engine.model, engine.controller, TOKEN_IDS[:24])
        found = []
        for token_id in TOKEN_IDS[24:]:
            engine.controller.begin_decode()
            found.append(np.array(engine.model.forward((token_id,)), np.float64))
    return np.array(found)


def kl(expected: np.ndarray, found: np.ndarray) -> float:
    """Return the largest KL divergence of the next token's distributions, in nats."""
    p, q = (one - np.logaddexp.reduce(one, axis=1, keepdims=True) for one in (expected, found))
    return float((np.exp(p) * (p - q)).sum(axis=1).max())


@pytest.mark.parametrize("layers", [99, 10, 0])
def test_logits_of_a_real_model(smollm2: Path, layers: int) -> None:
    """The processor's kernels round activations to 8 bits, and a device's need not: KL was 0.0003 to 0.009 here."""
    options = {"attention": "llama", "repack": False}
    found = logits_of(smollm2, **options, gpu_layers=layers)
    assert kl(logits_of(smollm2, **options), found) <= (MOST_KL_OF_ROUNDING if layers else 0)


def test_as_many_layers_as_fit(small: Path) -> None:
    options = {"attention": "llama", "kv_type": "f16"}
    expected = logits_of(small, **options, repack=False)
    with Runtime.open(small, **SMALL, **options, gpu_layers=3) as runtime:
        enough = max(gpu.total_bytes for gpu in runtime.plan.gpus)
    limited = {"gpu_layers": "auto", "gpu_memory": enough}
    with Runtime.open(small, **SMALL, **options, **limited) as runtime:
        assert all(gpu.fits and gpu.budget_bytes == enough for gpu in runtime.plan.gpus)
        assert runtime.plan.gpu_layers >= 3
    assert kl(expected, logits_of(small, **options, **limited)) <= MOST_KL


def test_two_devices(small: Path, devices: tuple[GpuDevice, ...]) -> None:
    if len(devices) < 2:
        pytest.skip("one device: GGML_VK_VISIBLE_DEVICES=0,0 makes two of it with Vulkan")
    options: dict[str, Any] = {"attention": "llama", "kv_type": "f16"}
    expected = logits_of(small, **options, repack=False)
    with Runtime.open(small, **SMALL, **options, gpu_layers=3) as runtime:
        enough = max(gpu.total_bytes for gpu in runtime.plan.gpus)
    limited = {"gpu_layers": 5, "gpu_memory": enough}
    with Runtime.open(small, **SMALL, **options, **limited) as runtime:
        assert len(runtime.plan.gpus) == 2 and runtime.plan.gpu_layers == 5
    assert kl(expected, logits_of(small, **options, **limited)) <= MOST_KL


@pytest.mark.parametrize("layers", [99, 2])
@pytest.mark.parametrize(
    "attention",
    [
        "llama",
        "dense",
        Tidal(k=12, selection_layers=(1,), sinks=2, recent=4),
        Delta(granularity="element", threshold=0),
    ],
    ids=["llama", "dense", "tidal", "delta"],
)
def test_logits_with_each_attention(small: Path, attention: Any, layers: int) -> None:
    expected = logits_of(small, attention=attention, repack=False)
    assert kl(expected, logits_of(small, attention=attention, gpu_layers=layers)) <= MOST_KL


@pytest.mark.parametrize("kv_type", ["q8_0"])
def test_logits_with_a_quantised_cache(small: Path, kv_type: str) -> None:
    options = {"attention": "llama", "kv_type": kv_type}
    expected = logits_of(small, **options, repack=False)
    assert kl(expected, logits_of(small, **options, gpu_layers=99)) <= MOST_KL


def test_speculation_changes_no_token(small: Path) -> None:
    options = {"attention": "llama", "gpu_layers": 99, **SMALL}
    text = "word1 word2 word1 word2 word1"
    answers = []
    for speculate in ("off", "ngram"):
        with Runtime.open(small, **options, speculate=speculate) as runtime:
            found = runtime.generate(text, max_tokens=8, temperature=0)
            answers.append(found.token_ids)
    assert answers[0] == answers[1]


def test_a_saved_chat_goes_on_where_it_was(small: Path, tmp_path: Path) -> None:
    options = {"attention": "llama", "gpu_layers": 99, **SMALL}
    messages = [{"role": "user", "content": "word1 word2"}]
    params: dict[str, Any] = {"max_tokens": 4, "temperature": 0}
    with Runtime.open(small, **options) as runtime:
        first = [chunk.token_id for chunk in runtime.chat(messages, **params)]
        runtime.saved_chats.save(tmp_path / "chat", messages)
    with Runtime.open(small, **options) as runtime:
        loaded = runtime.saved_chats.load(tmp_path / "chat")
        assert list(loaded.messages) == messages
        again = list(runtime.chat(loaded.messages, **params))
    assert [chunk.token_id for chunk in again] == first
    assert again[-1].stats.reused_tokens > 0


@pytest.mark.parametrize("level", ["background", "complete"])
def test_trimming_changes_no_token(small: Path, level: str) -> None:
    options = {"attention": "llama", "gpu_layers": 99, **SMALL}
    with Runtime.open(small, **options) as runtime:
        first = runtime.generate(PROMPT, max_tokens=4, temperature=0).token_ids
        runtime.trim(level)
        assert runtime.generate(PROMPT, max_tokens=4, temperature=0).token_ids == first


@pytest.mark.parametrize("attention", ["llama", "dense"])
def test_a_batch_has_the_answers_of_its_prompts(small: Path, attention: str) -> None:
    options = {"attention": attention, "kv_type": "f16", "gpu_layers": 99, **SMALL}
    params: dict[str, Any] = {"max_tokens": 3, "temperature": 0}
    prompts = ["word1 word2", "word7"]
    with Runtime.open(small, **options) as runtime:
        alone = [runtime.generate(prompt, **params).token_ids for prompt in prompts]
        together = [result.token_ids for result in runtime.generate_batch(prompts, **params)]
    assert together == alone


def test_a_batch_without_room_on_the_device_is_refused(small: Path) -> None:
    options = {"attention": "llama", "kv_type": "f16", "gpu_layers": 99, **SMALL}
    with Runtime.open(small, **options) as runtime:
        (gpu,) = runtime.plan.gpus
    with (
        Runtime.open(small, **options, gpu_memory=gpu.total_bytes) as runtime,
        pytest.raises(OverBudget, match="a batch of 2 sequences beside the model on"),
    ):
        runtime.generate_batch(["word1", "word7"], max_tokens=3)
