"""A BERT in numpy, from its paper alone (Devlin et al. 2018): the vectors that an encoder's tokens must have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

Tensors = Mapping[str, np.ndarray]
EPSILON = 1e-12
_erf = np.vectorize(math.erf)


def token_vectors(tensors: Tensors, token_ids: Sequence[int], heads: int) -> np.ndarray:
    """Return the last layer's vectors, fp64, shape [tokens, width]; `tensors` by their names in a GGUF file."""
    x = tensors["token_embd.weight"][list(token_ids)].astype(np.float64)
    x += tensors["position_embd.weight"][: len(x)] + tensors["token_types.weight"][0]
    x = _norm(tensors, "token_embd_norm", x)
    for layer in range(sum(name.endswith(".attn_q.weight") for name in tensors)):
        name = f"blk.{layer}"
        attended = _linear(tensors, f"{name}.attn_output", _attention(tensors, name, x, heads))
        x = _norm(tensors, f"{name}.attn_output_norm", x + attended)
        hidden = _linear(tensors, f"{name}.ffn_up", x)
        hidden *= 0.5 * (1 + _erf(hidden / math.sqrt(2)))
        x = _norm(
            tensors, f"{name}.layer_output_norm", x + _linear(tensors, f"{name}.ffn_down", hidden)
        )
    return x


def _attention(tensors: Tensors, name: str, x: np.ndarray, heads: int) -> np.ndarray:
    query, key, value = (
        _linear(tensors, f"{name}.attn_{which}", x).reshape(len(x), heads, -1).swapaxes(0, 1)
        for which in "qkv"
    )
    scores = query @ key.swapaxes(1, 2) / math.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ value).swapaxes(0, 1).reshape(x.shape)


def _linear(tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    return x @ tensors[f"{name}.weight"].T.astype(np.float64) + tensors[f"{name}.bias"]


def _norm(tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
    return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]
