"""A model with repacked weights, timed beside llama.cpp through its C API, in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paired import paired
from peer import Peer

from lowtide.attention.registry import parse_policy
from lowtide.memory.units import GIB
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

TEXT = "The tide comes in, the tide goes out, and nobody on the shore knows what it is about. "
NUM_DECODED = 24
ROWS = 128


class RepackedModel:
    """The model from its repacked copy, with lowtide's exact attention, unless `kernels` say otherwise."""

    def __init__(self, path: Path, context: int = 2048, **kernels: Any) -> None:
        chosen = {"attention": "dense", "repack": True, **kernels}
        options = LoadConfig(memory=8 * GIB, context=context, batch_size=ROWS, threads=2, **chosen)
        self.loaded = Engine(plan_reference(path, options))
        self.model = self.loaded.model
        self.token_ids = self.model.tokenizer.encode(
            TEXT * (context // 18), add_special=True, parse_special=False
        )

    def prefill(self, length: int) -> None:
        """Read the text's first tokens into an empty cache."""
        self.model.truncate(0)
        for at in range(0, length, ROWS):
            self.model.forward(self.token_ids[at : min(at + ROWS, length)])

    def decode(self, depth: int, attention: str | None = None) -> None:
        """Decode the text from `depth` on; with another attention if one is named."""
        hook = self.loaded.hook
        assert hook is not None
        controller = None
        if attention is not None:
            policy = parse_policy(attention).resolve(self.model.spec)
            controller = policy.configure(hook, self.model.spec)
        self.model.truncate(depth)
        for token_id in self.token_ids[depth : depth + NUM_DECODED]:
            if controller is not None:
                controller.begin_decode()
            self.model.forward((token_id,)).argmax()

    def verify(self, depth: int, num_rows: int) -> None:
        """Compute so many rows behind `depth` others, again and again."""
        for _ in range(NUM_DECODED):
            self.model.truncate(depth)
            self.model.forward(self.token_ids[depth : depth + num_rows])


def compare_decode(
    benchmark: Any,
    name: str,
    repacked: RepackedModel,
    llama: Peer,
    depth: int,
    *,
    attention: str | None = None,
    rounds: int = 15,
    is_filled: bool = False,
) -> None:
    """Time tokens behind `depth` others, which both read first unless they have."""
    if not is_filled:
        repacked.prefill(depth)
        llama.prefill(repacked.token_ids[:depth])

    def peers() -> None:
        llama.api.llama_memory_seq_rm(llama.memory, 0, depth, -1)
        for token_id in repacked.token_ids[depth : depth + NUM_DECODED]:
            llama._decode([token_id])

    label = f"repacked, {attention or 'dense'}, decode at {depth}"
    paired(benchmark, label, lambda: repacked.decode(depth, attention), peers, rounds, peer=name)


def compare_prefill(
    benchmark: Any, name: str, repacked: RepackedModel, llama: Peer, length: int, rounds: int = 9
) -> None:
    """Time a whole prompt."""
    token_ids = repacked.token_ids[:length]
    paired(
        benchmark, f"repacked, prompt of {length}", lambda: repacked.prefill(length),
        lambda: llama.prefill(token_ids), rounds, peer=name,
    )  # fmt: skip


def compare_verification(benchmark: Any, repacked: RepackedModel, num_rows: int) -> None:
    """How much less than so many single rows; rows / ratio is the cost in single rows."""
    repacked.prefill(256)

    def alone() -> None:
        for _ in range(num_rows):
            repacked.verify(256, 1)

    paired(
        benchmark, f"repacked, {num_rows} rows at once", lambda: repacked.verify(256, num_rows), alone, 9,
        peer=f"{num_rows} single rows",
    )  # fmt: skip
