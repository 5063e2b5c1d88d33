"""OnnxSpec: a ModelSpec plus what a session needs to know of the graph's inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lowtide.models.onnx.rewrite.plan import RepackPlan, RewritePlan
from lowtide.models.spec import ModelSpec

KV_TYPE_OF = {"float32": "f32", "float16": "f16"}
"""The KV type, as memory plans call it, of keys and values with that ONNX element type."""
ELEMENT_BYTES = {"float32": 4, "float16": 2}
FINGERPRINT = "lowtide.fingerprint"
"""The key in a graph's metadata with the fingerprint of the model that it was converted from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPorts:
    """The names of a layer's KV cache, keys and values, as graph inputs and as graph outputs."""

    past: tuple[str, str]
    present: tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphPorts:
    """The names of a graph's inputs and outputs; None for an input that the graph does not have."""

    token_ids: str
    attention_mask: str | None
    position_ids: str | None
    logits: str
    layers: tuple[LayerPorts, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxSpec(ModelSpec):
    """The spec of an ONNX decoder.

    `shares_cache`: every layer writes new keys and values into the buffer of the past ones; otherwise each
    pass makes a longer copy. `last_logits_only`: the graph returns logits of a batch's last token alone.
    `attention` names the graph's attention operator. `max_matmul_width` is the most columns of a layer's
    matmul, `dequantised_bytes` the largest weight that onnxruntime dequantises in each pass because it has
    no kernel for it.

    `rewrite` is the plan for running the graph with lowtide's attention, `repack` the one for running its
    matmuls too; a string instead says why that is impossible and completes "its graph ...". `tiles` is the
    file of repacked weights, once there is one.
    """

    ports: GraphPorts
    kv_element: str
    logits_element: str
    last_logits_only: bool
    shares_cache: bool
    attention: str
    max_matmul_width: int
    dequantised_bytes: int
    end_ids: frozenset[int]
    tokenizer_path: Path
    special_texts: tuple[tuple[str, str], ...]
    rewrite: RewritePlan | str
    repack: RepackPlan | str
    tiles: Path | None = None
