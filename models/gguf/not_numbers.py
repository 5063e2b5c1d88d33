"""Finds where the values of a forward pass stop being numbers: an observed pass, after a real one had such logits."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from typing import Any

from lowtide.models.gguf.llama_cpp import LlamaLibrary

F32 = 0
_LAYER = re.compile(r"-(\d+)(?:$| )")
"""llama.cpp names the nodes of layer 3 "NAME-3", with words in brackets behind it for views of them."""


def first_not_number(
    library: LlamaLibrary, model: Any, params: Any, token_ids: Sequence[int]
) -> str | None:
    """Compute the tokens in a context of their own; return "layer N", the name of a node outside the layers, or None.

    `params` are those of a context of at least so many tokens. None: there the pass has numbers, or there is no
    memory for it.
    """
    api, node = library.api, _FirstNode(library)
    callback = api.ggml_backend_sched_eval_callback(node)
    params.cb_eval, params.cb_eval_user_data = callback, None
    context = api.llama_init_from_model(model, params)
    if not context:
        return None
    batch = api.llama_batch_init(len(token_ids), 0, 1)
    try:
        for i, token_id in enumerate(token_ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token_id, i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i == len(token_ids) - 1
        batch.n_tokens = len(token_ids)
        library.decode(context, batch)
    finally:
        api.llama_batch_free(batch)
        library.free_context(context)
    layer = _LAYER.search(node.name or "")
    return f"layer {layer[1]}" if layer else node.name


class _FirstNode:
    """An evaluation callback of ggml that looks at each node's values until one is not a number."""

    def __init__(self, library: LlamaLibrary) -> None:
        self.name: str | None = None
        self._name = _function(library, "ggml_get_name", ctypes.c_char_p)
        self._data = _function(library, "ggml_get_data", ctypes.c_void_p)
        self._count = _function(library, "ggml_nelements", ctypes.c_int64)
        self._is_contiguous = _function(library, "ggml_is_contiguous", ctypes.c_bool)

    def __call__(self, tensor: int, ask: bool, _user_data: object) -> bool:
        """Ask for every node, and stop the pass at the first with NaN or an infinity."""
        import numpy as np

        if ask or self.name is not None:
            return self.name is None
        is_f32 = ctypes.c_int32.from_address(tensor).value == F32
        data, count = self._data(tensor), self._count(tensor)
        if not is_f32 or not data or not count or not self._is_contiguous(tensor):
            return True
        values = np.ctypeslib.as_array((ctypes.c_float * count).from_address(data))
        # Masks hold -inf, and so may what is computed from them.
        if np.isnan(values.max()) or values.max() == np.inf:
            self.name = self._name(tensor).decode(errors="replace")
        return self.name is None


def _function(library: LlamaLibrary, name: str, result: Any) -> Callable[[int], Any]:
    return ctypes.CFUNCTYPE(result, ctypes.c_void_p)(library.address(name))
