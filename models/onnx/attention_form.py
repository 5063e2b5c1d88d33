"""Which form of attention a decoder's graph has: what is told of it, and whether it shares its cache."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lowtide.models.onnx.graph import OnnxGraph
from lowtide.models.onnx.spec import GraphPorts

FORMS = {
    ("com.microsoft", "GroupQueryAttention"): "GroupQueryAttention",
    ("com.microsoft", "MultiHeadAttention"): "MultiHeadAttention",
    ("", "Attention"): "Attention",
}
DECOMPOSED = "decomposed attention"
SHARING = "GroupQueryAttention"
_PAST, _PRESENT = (3, 4), (1, 2)
"""GroupQueryAttention's inputs and outputs of keys and values."""


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """The form of most layers; `shares_cache` is true where that holds for all."""

    name: str
    shares_cache: bool


def attention_form(graph: OnnxGraph, ports: GraphPorts) -> AttentionForm:
    """Return the form; a graph that has no attention node is taken for decomposed."""
    kinds = Counter(
        FORMS[node.domain, node.kind] for node in graph.nodes if (node.domain, node.kind) in FORMS
    )
    name = kinds.most_common(1)[0][0] if kinds else DECOMPOSED
    shared = {
        (node.input(past), node.outputs[present])
        for node in graph.nodes
        if FORMS.get((node.domain, node.kind)) == SHARING
        for past, present in zip(_PAST, _PRESENT, strict=True)
        if present < len(node.outputs)
    }
    wanted = {
        pair for layer in ports.layers for pair in zip(layer.past, layer.present, strict=True)
    }
    return AttentionForm(name, wanted <= shared)
