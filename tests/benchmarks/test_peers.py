"""lowtide's default options beside its strongest peers: tokens/s of prompts and of decoding, and peak memory.

Every engine is a process of its own. All are open at once, and one of them works at a time, in turn; figures are
medians of the rounds, and ratios the medians of the rounds' ratios, with their spread. `make bench-peers` installs the
peers in build/peers and runs this. An engine that is not installed, or does not open the model, is left out, and a
line says so. `PEERS_ROUNDS` is a number, `PEERS_KINDS` some of the models, `PEERS_LENGTHS` some of the prompts.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_model
from peers.process import NotOpened, PeerProcess, opened
from requantised import requantised

from lowtide.memory.units import MIB
from lowtide.models.catalog import resolve
from lowtide.models.convert.convert import convert
from lowtide.models.read_spec import read_spec

pytestmark = pytest.mark.benchmark

TOKENS = 33
ROUNDS = int(os.environ.get("PEERS_ROUNDS", "3"))
LARGE = {
    "layers": 16, "width": 2048, "heads": 32, "kv_heads": 8, "feed_forward": 8192,
    "vocabulary": 128_256, "context": 2048,
}  # fmt: skip
KINDS = os.environ.get(
    "PEERS_KINDS", "smollm2-q4_0,smollm2-q4_1,gemma3-270m,1b-q4_0,1b-q4_k"
).split(",")
LENGTHS = {
    "smollm2-q4_0": (256, 512, 2048, 7600),
    "smollm2-q4_1": (256, 512, 2048),
    "gemma3-270m": (256, 512),
    "1b-q4_0": (256, 512),
    "1b-q4_k": (256, 512),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("models")
    return Model(request.param, folder)


class Model:
    """The file of one kind of model, and the ONNX folder that is converted from it where one can be."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        name, _, quantised = kind.partition("-")
        if name == "1b":
            self.path = folder / f"{kind}.gguf"
            write_model(self.path, **LARGE, quantised=quantised.upper())
        elif kind == "smollm2-q4_0":
            self.path = requantised(resolve("smollm2"), folder / f"{kind}.gguf", "Q4_0")
        else:
            self.path = resolve("smollm2" if name == "smollm2" else kind)
        spec = read_spec(self.path)
        self.vocabulary = spec.vocabulary.num_tokens
        self.onnx: Path | None = None
        if name == "smollm2":
            self.onnx = convert(spec, folder / "onnx").folder

    def engines(self) -> Iterator[tuple[str, str, Path]]:
        """Yield a label, the file of tests/support/peers, and the model it opens."""
        yield "lowtide", "own", self.path
        yield "llama.cpp", "llama", self.path
        yield "OpenVINO GenAI", "openvino", self.path
        if self.onnx is not None:
            yield "onnxruntime-genai", "onnx_genai", self.onnx


def prompt(seed: int, length: int, vocabulary: int) -> list[int]:
    """Return a prompt that no engine has seen: its first token is new."""
    drawn = random.Random(seed)
    return [drawn.randrange(300, min(vocabulary, 40_000)) for _ in range(length)]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def test_beside_peers(benchmark: Any, model: Model) -> None:
    lengths = LENGTHS[model.kind]
    if "PEERS_LENGTHS" in os.environ:
        lengths = tuple(int(n) for n in os.environ["PEERS_LENGTHS"].split(","))
    with ExitStack() as stack:
        engines: dict[str, PeerProcess] = {}
        for label, name, path in model.engines():
            try:
                engines[label] = stack.enter_context(
                    contextlib.closing(opened(name, path, max(lengths) + 256))
                )
            except NotOpened as reason:
                print(f"\n{label} is left out: {reason}")
        found: dict[tuple[str, int], list[dict[str, float]]] = {}

        def once() -> None:
            for length in lengths:
                for seed in range(ROUNDS + 1):
                    tokens = prompt(seed, length, model.vocabulary)
                    for label, engine in engines.items():
                        took = engine.answer(tokens, TOKENS)
                        if seed > 0 or length > 2048:  # the first is a warm-up
                            found.setdefault((label, length), []).append(took)

        benchmark.pedantic(once, rounds=1)
    benchmark.extra_info["peers"] = report(model.kind, list(engines), lengths, found)


def report(
    kind: str,
    labels: list[str],
    lengths: tuple[int, ...],
    found: dict[tuple[str, int], list[dict[str, float]]],
) -> list[dict[str, Any]]:
    """Print one line for each engine and length; return them."""
    lines = []
    for length in lengths:
        own = found["lowtide", length]
        for label in labels:
            took = found[label, length]
            pairs = list(zip(own, took, strict=True))
            line = {
                "model": kind, "tokens": length, "engine": label,
                "prompt_tokens_per_s": statistics.median(length / t["prompt_s"] for t in took),
                "decode_tokens_per_s": statistics.median(1 / t["token_s"] for t in took),
                "prompt_ratios": [t["prompt_s"] / o["prompt_s"] for o, t in pairs],
                "decode_ratios": [t["token_s"] / o["token_s"] for o, t in pairs],
                "peak_bytes": max(t["peak_bytes"] for t in took),
            }  # fmt: skip
            lines.append(line)
            print(
                f"\n{kind} at {length}: {label}: prompt {line['prompt_tokens_per_s']:.0f} tokens/s, "
                f"lowtide {spread(line['prompt_ratios'])} x; decode {line['decode_tokens_per_s']:.1f}, "
                f"lowtide {spread(line['decode_ratios'])} x; peak {line['peak_bytes'] / MIB:.0f} MiB",
                end="",
            )
    return lines
