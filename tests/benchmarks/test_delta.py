"""The delta policy compared with lowtide's dense attention: time, keys read, and resident memory.

In llama.cpp's graph, and in the ONNX graph of the converted model. Run with `make bench`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from essays import essays
from paired import paired

from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.attention.bindings.onnx_ops import OnnxAttention
from lowtide.attention.registry import parse_policy
from lowtide.models.convert.convert import convert
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.gguf.model import GgufModel
from lowtide.models.gguf.parameters import LoadOptions
from lowtide.models.model import Model
from lowtide.models.onnx.config import OnnxOptions
from lowtide.models.onnx.rewrite.model import RewrittenOnnxModel
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.read_spec import read_spec as read_header

pytestmark = pytest.mark.benchmark

NUM_DECODED, ROWS = 16, 128
POLICIES = ("delta", "delta:sparsity=0.5", "delta:sparsity=0.5,refine=0")
BLOCKS = (
    "delta:granularity=block,sparsity=0.5",
    "delta:granularity=block,sparsity=0.7",
    "delta:granularity=block,block=16,sparsity=0.5",
    "delta:granularity=element,sparsity=0.7",
)
CALIBRATED = ("delta", "delta:granularity=block", "delta:granularity=element")


class Bench:
    """A model with lowtide's kernels and a text; each policy decodes after a prompt that it read itself."""

    def __init__(self, model: Model, hook: LlamaHook | OnnxAttention) -> None:
        self.hook, self.spec, self.model = hook, model.spec, model
        self.token_ids = model.tokenizer.encode(essays(), add_special=True, parse_special=False)

    def read(self, policy: str, depth: int) -> None:
        parse_policy(policy).resolve(self.spec).configure(self.hook, self.spec).begin_prefill()
        self.model.truncate(0)
        for at in range(0, depth, ROWS):
            self.model.forward(self.token_ids[at : min(at + ROWS, depth)])

    def step(self, depth: int) -> None:
        """Decode after the prompt in the cache, with the policy of the hook."""
        self.model.truncate(depth)
        for token_id in self.token_ids[depth : depth + NUM_DECODED]:
            self.model.forward((token_id,))


@pytest.fixture(scope="module")
def bench(smollm2: Path) -> Iterator[Bench]:
    hook = LlamaHook(threads=2)
    options = LoadOptions(context=8192, batch_size=ROWS, threads=2, eval_callback=hook.callback)
    model = GgufModel(read_spec(smollm2), options)
    yield Bench(model, hook)
    model.close()
    hook.close()


@pytest.fixture(scope="module")
def onnx_bench(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = convert(read_spec(smollm2), tmp_path_factory.mktemp("converted") / "smollm2").folder
    attention, spec = OnnxAttention(2), read_header(folder)
    assert isinstance(spec, OnnxSpec)
    options = OnnxOptions(context=8192, batch_size=ROWS, threads=2, kv_type="f16")
    model = RewrittenOnnxModel(spec, options, attention)
    yield Bench(model, attention)
    model.close()


def compare_with_dense(benchmark: Any, bench: Bench, policy: str, depth: int) -> float:
    """Time tokens after a dense prompt; return the policy's attention time as a share of dense attention's.

    The first round also builds what the policy stores about the prompt.
    """
    bench.read("dense", depth)
    controller = parse_policy(policy).resolve(bench.spec).configure(bench.hook, bench.spec)
    policy_s, dense_s = list[float](), list[float]()

    def decode(start: Callable[[], None], seconds: list[float]) -> None:
        start()
        before = bench.hook.counts().seconds
        bench.step(depth)
        seconds.append((bench.hook.counts().seconds - before) / NUM_DECODED)

    paired(
        benchmark,
        f"{policy}, decode at {depth}",
        lambda: decode(controller.begin_decode, policy_s),
        lambda: decode(lambda: bench.hook.start_pass(sparse=False), dense_s),
        rounds=15,
        peer="lowtide's dense attention",
    )
    sparse, dense = statistics.median(policy_s), statistics.median(dense_s)
    print(
        f"attention {1000 * sparse:.2f} ms/token, dense {1000 * dense:.2f} ms/token: {sparse / dense:.2f} x"
    )
    return sparse / dense


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("depth", [2048, 7600])
def test_decode(benchmark: Any, bench: Bench, depth: int, policy: str) -> None:
    compare_with_dense(benchmark, bench, policy, depth)
    bench.hook.start_grouped(refine=True)
    before = bench.hook.counts()
    bench.step(depth)
    counts = bench.hook.counts()
    share = (counts.keys_read - before.keys_read) / (counts.keys_visible - before.keys_visible)
    print(f"{share:.1%} of the keys and values read, {counts.scratch_bytes:,} bytes of groups")
    assert share < 0.9


@pytest.mark.parametrize("policy", BLOCKS)
def test_decode_by_blocks(benchmark: Any, bench: Bench, policy: str) -> None:
    """Values are read as with dense attention, key blocks only if they are stored."""
    before = bench.hook.counts().scores
    compare_with_dense(benchmark, bench, policy, 7600)
    cost = bench.hook.counts().scores - before
    print(
        f"{cost}, {1 - cost.key_bytes_read / cost.key_bytes_total:.0%} of the bytes of keys not read"
    )
    assert cost.skipped > 0.4


@pytest.mark.parametrize("policy", [POLICIES[1], BLOCKS[0]])
def test_decode_in_an_onnx_graph(benchmark: Any, onnx_bench: Bench, policy: str) -> None:
    compare_with_dense(benchmark, onnx_bench, policy, 7600)


@pytest.mark.parametrize("policy", CALIBRATED)
@pytest.mark.parametrize("length", [2048, 7600])
def test_prefill(benchmark: Any, bench: Bench, length: int, policy: str) -> None:
    """With the calibration, and including what the policy stores about the prompt."""
    paired(
        benchmark,
        f"{policy}, prompt of {length}",
        lambda: bench.read(policy, length),
        lambda: bench.read("dense", length),
        rounds=3,
        peer="lowtide's dense attention",
    )
