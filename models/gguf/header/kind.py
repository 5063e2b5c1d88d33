"""The kind of a model, and its default pooling: by its header, and by what llama.cpp makes of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from lowtide.models.kind import DECODER, ENCODER, ENCODER_DECODER, Kind

POOLINGS = ("none", "mean", "cls", "last", "rank")
"""llama.cpp's pooling types, by their numbers."""
UNSPECIFIED_POOLING = -1
_NOT_CAUSAL = re.compile(r"causal_attn += 0$")


def header_kind(causal: object, tensor_names: Iterable[str]) -> Kind:
    """Return the kind by the header: `causal` is its attention.causal, None where it has none."""
    stacks = {name.partition(".")[0] for name in tensor_names}
    if "enc" in stacks:
        return ENCODER_DECODER if "dec" in stacks else ENCODER
    return ENCODER if causal is False else DECODER


def llama_kind(api: Any, model: Any, context: Any, messages: Sequence[str] = ()) -> Kind:
    """Return the kind by what llama.cpp says of a model, and of a context of it with the log `messages`.

    A decoder has memory (a KV cache or a recurrent state) and attends to earlier tokens only.
    """
    if api.llama_model_has_encoder(model):
        return ENCODER_DECODER if api.llama_model_has_decoder(model) else ENCODER
    generates = api.llama_model_has_decoder(model) and api.llama_get_memory(context)
    return DECODER if generates and not any(map(_NOT_CAUSAL.search, messages)) else ENCODER
