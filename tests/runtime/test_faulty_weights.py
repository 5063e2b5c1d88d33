"""Models whose weights are not numbers, or have types that ggml cannot compute: an error, and the process lives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from lowtide import Runtime
from lowtide.models.logits import are_numbers
from lowtide.runtime.errors import ForwardError
from tests.support.gguf_files import write_model
from tests.support.hybrid_models import write_lfm2
from tests.support.onnx_decoders import write_decoder
from tests.support.processes import run_lowtide

PROMPTS = ["ab ab ab", "cd cd cd"]


def with_nan(tensor: str) -> Callable[[str, np.ndarray], np.ndarray]:
    def changed(name: str, values: np.ndarray) -> np.ndarray:
        if name == tensor:
            values.flat[3] = np.nan
        return values

    return changed


def huge(name: str, values: np.ndarray) -> np.ndarray:
    return values * np.float32(3e38) if name == "output_norm.weight" else values


def as_type(tensor: str, kind: type) -> Callable[[str, np.ndarray], np.ndarray]:
    return lambda name, values: (values * 100).astype(kind) if name == tensor else values


def opened(path: Path, **options: object) -> Runtime:
    return Runtime.open(path, memory="8GiB", context=256, **options)


WAYS: dict[str, tuple[dict[str, object], Callable[[Runtime], object]]] = {
    "greedy": ({}, lambda r: r.generate(PROMPTS[0], max_tokens=4, temperature=0)),
    "sampled": ({}, lambda r: r.generate(PROMPTS[0], max_tokens=4, temperature=1, seed=1)),
    "dense": (
        {"attention": "dense"},
        lambda r: r.generate(PROMPTS[0], max_tokens=4, temperature=0),
    ),
    "batch": ({}, lambda r: r.generate_batch(PROMPTS, max_tokens=4, temperature=0)),
    "speculation": (
        {"attention": "dense", "speculate": "ngram"},
        lambda r: r.generate(PROMPTS[0], max_tokens=8, temperature=0),
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("changed", "place"),
    [
        (with_nan("output_norm.weight"), "result_norm"),
        (with_nan("blk.1.attn_norm.weight"), "layer 1"),
        (with_nan("output.weight"), "result_output"),
        (huge, "result_"),
    ],
)
def test_logits_that_are_not_numbers_are_an_error(
    tmp_path: Path, changed: Callable[[str, np.ndarray], np.ndarray], place: str, way: str
) -> None:
    path = write_model(tmp_path / "faulty.gguf", changed=changed)
    options, answer = WAYS[way]
    with (
        pytest.raises(ForwardError, match=rf"logits are not numbers \(first at {place}"),
        opened(path, **options) as runtime,
    ):
        answer(runtime)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("form", ["gqa", "decomposed"])
@pytest.mark.parametrize(
    ("weight", "place"),
    [
        ("embedding", "in the keys or values of layer 0"),
        ("l1.v", "in the keys or values of layer 1"),
        ("l1.gate", "behind the keys and values of layer 1, at the output 'logits'"),
        ("head", "behind the keys and values of layer 1, at the output 'logits'"),
    ],
)
def test_logits_of_an_onnx_model_that_are_not_numbers_name_the_layer(
    tmp_path: Path, weight: str, place: str, form: str, reference: bool
) -> None:
    def changed(name: str, values: np.ndarray) -> np.ndarray:
        if name == weight:
            values[:] = np.nan
        return values

    folder = write_decoder(tmp_path / "onnx", form, changed=changed)
    with (
        opened(folder, reference=reference) as runtime,
        pytest.raises(ForwardError, match=rf"logits are not numbers \(first {place}\)"),
    ):
        runtime.generate(PROMPTS[0], max_tokens=4, temperature=0)


def test_a_masked_token_is_a_number() -> None:
    masked = np.array([[1.0, -np.inf, 2.0]], np.float32)
    assert are_numbers(masked) and are_numbers(np.empty((0, 3), np.float32))
    for wrong in (np.nan, np.inf):
        assert not are_numbers(np.where(masked > 1, np.float32(wrong), masked))
    assert not are_numbers(np.full((1, 3), -np.inf, np.float32))


@pytest.mark.parametrize("attention", ["llama", "dense"])
@pytest.mark.parametrize(
    ("tensor", "kind", "name"),
    [
        ("output_norm.weight", np.float16, "F16"),
        ("blk.1.attn_norm.weight", np.int8, "I8"),
        ("token_embd.weight", np.int8, "I8"),
        ("blk.0.attn_q.weight", np.float64, "F64"),
        ("blk.1.ffn_down.weight", np.int16, "I16"),
        ("output.weight", np.int32, "I32"),
    ],
)
def test_a_type_without_a_kernel_is_an_error(
    tmp_path: Path, tensor: str, kind: type, name: str, attention: str
) -> None:
    path = write_model(tmp_path / "odd.gguf", changed=as_type(tensor, kind))
    with pytest.raises(ForwardError, match=rf"cannot compute .*{tensor} \({name}\)"):
        opened(path, attention=attention)


def test_an_unusual_type_that_ggml_computes_runs(tmp_path: Path) -> None:
    path = write_model(tmp_path / "halves.gguf", quantised="NVFP4", width=256, feed_forward=256)
    with opened(path) as runtime:
        assert runtime.spec.unusual_tensors
        assert runtime.generate(PROMPTS[0], max_tokens=3, temperature=0).token_ids


@pytest.mark.parametrize("speculate", ["ngram", "auto"])
def test_a_hybrid_model_answers_a_batch_without_drafts(tmp_path: Path, speculate: str) -> None:
    path = write_lfm2(tmp_path / "lfm2.gguf")
    with opened(path, attention="dense", speculate=speculate) as runtime:
        results = runtime.generate_batch(PROMPTS, max_tokens=12, temperature=0)
        alone = [runtime.generate(prompt, max_tokens=12, temperature=0) for prompt in PROMPTS]
    assert [len(result.token_ids) for result in results] == [12, 12]
    assert [result.token_ids for result in results] == [result.token_ids for result in alone]
    assert "recurrent" in str(results[0].stats.speculation)


def test_a_vocabulary_without_its_first_token_is_an_error_while_planning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unigram(writer: gguf.GGUFWriter, _name: str) -> None:
        writer.add_string("tokenizer.ggml.model", "t5")

    monkeypatch.setattr(gguf.GGUFWriter, "add_tokenizer_model", unigram)
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_bos_token_id", lambda writer, _: writer.add_add_bos_token(True)
    )
    path = write_model(tmp_path / "unigram.gguf")
    finished = run_lowtide("run", str(path), "--raw", "-p", "Hi", "-n", "2")
    assert finished.code == 2
    assert "cannot tokenise" in finished.stderr
