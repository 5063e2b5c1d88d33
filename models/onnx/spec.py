"""OnnxSpec: a ModelSpec, and what a session must know of the graph's inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    from lowtide.models.onnx.read_spec import RepackPlan
    from lowtide.models.onnx.rewrite.rewrite import RewritePlan

ENGINE = "onnxruntime"
KV_TYPES = {"float32": "f32", "float16": "f16"}
"""Element types that keys and values may have in a graph, and the names that a plan has for them."""
FINGERPRINT = "lowtide.fingerprint"
"""The note in a graph's metadata that has the fingerprint of the model that it was converted from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPorts:
    """The names of a layer's keys and values, as they go in and as they come out."""

    past: tuple[str, str]
    present: tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphPorts:
    """The names of a graph's inputs and outputs; None where it has no such input."""

    token_ids: str
    attention_mask: str | None
    position_ids: str | None
    logits: str
    layers: tuple[LayerPorts, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxSpec(ModelSpec):
    """The spec of an ONNX decoder.

    Where every layer's attention `shares_cache`, new keys and values are written into the buffer that has
    the old ones; else a pass makes a longer copy. With `makes_last_row` logits are of a pass's last row
    alone, not of all. `attention` says in words what the graph attends with.
    `max_matmul_width` is the most columns of a product of a layer, `original_bytes` the most that a product
    without a kernel of its own unpacks for a moment. `swap` is what stays of the graph where attention is
    to be ours, or says why it cannot be, in words that follow "its graph"; `packed` the same where products
    are to be ours, too. `tiles` is the file of packed weights, where one is read.
    """

    ports: GraphPorts
    kv_element: str
    logits_element: str
    makes_last_row: bool
    shares_cache: bool
    attention: str
    max_matmul_width: int
    original_bytes: int
    end_ids: frozenset[int]
    tokenizer_path: Path
    special_texts: tuple[tuple[str, str], ...]
    swap: RewritePlan | str
    packed: RepackPlan | str
    tiles: Path | None = None
