"""Which weights a pass reads together, and where they lie in the files. Reads no weights."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from lowtide.models.gguf_reader import GgufContents
from lowtide.models.spec import WeightGroup, WeightSpan

ATTENTION_OUTPUT = ".attn_output"
"""In the name of every tensor between a layer's attention and what is added to its input."""
_LAYER = re.compile(r"^blk\.(\d+)\.")


def weight_groups(parts: Sequence[GgufContents]) -> tuple[WeightGroup, ...]:
    """Return a group for each layer, in order, and one for each tensor outside of them."""
    layers = defaultdict[int, list[WeightSpan]](list)
    projection_bytes = Counter[int]()
    others = []
    for number, part in enumerate(parts):
        for tensor in part.tensors:
            span = WeightSpan(number, part.data_start + tensor.offset, tensor.num_bytes)
            layer = _LAYER.match(tensor.name)
            if layer is None:
                others.append(WeightGroup(None, (span,), tensor.name))
                continue
            number_of_layer = int(layer[1])
            layers[number_of_layer].append(span)
            if ATTENTION_OUTPUT in tensor.name:
                projection_bytes[number_of_layer] += tensor.num_bytes
    by_layer = (
        WeightGroup(layer, _joined(layers[layer]), projection_bytes=projection_bytes[layer])
        for layer in sorted(layers)
    )
    return (*by_layer, *others)


def _joined(spans: Iterable[WeightSpan]) -> tuple[WeightSpan, ...]:
    """Spans in order, those that touch (but for the alignment between tensors) as one."""
    joined: list[WeightSpan] = []
    for span in sorted(spans, key=lambda s: (s.part, s.offset)):
        last = joined[-1] if joined else None
        gap = span.offset - (last.offset + last.num_bytes) if last else -1
        if last is not None and last.part == span.part and 0 <= gap < 4096:
            end = span.offset + span.num_bytes
            joined[-1] = WeightSpan(last.part, last.offset, end - last.offset)
        else:
            joined.append(span)
    return tuple(joined)
