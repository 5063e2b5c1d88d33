"""One attention node in a graph of ggml's own, computed by llama.cpp's kernel or by ours.

What no model at hand has (sinks, several streams, odd views) can be put into a node like this.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.models.gguf.llama_cpp import llama_library

F32, F16 = 0, 1
TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}
MEMORY_BYTES = 256 << 20


class _InitParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


def _function(name: str, result: Any, *arguments: Any) -> Any:
    return ctypes.CFUNCTYPE(result, *arguments)(llama_library().address(name))


_P, _I64 = ctypes.c_void_p, ctypes.c_int64


class AttentionGraph:
    """softmax(scale q k + mask) v as one FLASH_ATTN_EXT node.

    Arrays: `q` (streams, heads, rows, size) float32; `k`, `v` (streams, kv_heads, keys, stored row),
    float16 or the bytes of quantised blocks; `mask` (streams, rows, keys) float16; `sinks` (heads,).
    """

    def __init__(
        self,
        q: Any,
        k: Any,
        v: Any,
        mask: Any,
        *,
        size: int,
        scale: float,
        softcap: float = 0.0,
        max_bias: float = 0.0,
        sinks: Any = None,
        kv_type: str = "f16",
        k_name: str = "cache_k_l0",
    ) -> None:
        self._context = _function("ggml_init", _P, _InitParams)(
            _InitParams(MEMORY_BYTES, None, False)
        )
        streams, heads, rows, _ = q.shape
        kv_heads, keys = k.shape[1:3]
        kind = TYPES[kv_type]
        tensors = [
            self._tensor(F32, (size, rows, heads, streams), q),
            self._tensor(kind, (size, keys, kv_heads, streams), k),
            self._tensor(kind, (size, keys, kv_heads, streams), v),
            self._tensor(F16, (keys, rows, 1, streams), mask),
        ]
        _function("ggml_set_name", _P, _P, ctypes.c_char_p)(tensors[1], k_name.encode())
        f = ctypes.c_float
        self.node = _function("ggml_flash_attn_ext", _P, _P, _P, _P, _P, _P, f, f, f)(
            self._context, *tensors, scale, max_bias, softcap
        )
        if sinks is not None:
            tensor = self._tensor(F32, (heads, 1, 1, 1), sinks)
            _function("ggml_flash_attn_ext_add_sinks", None, _P, _P)(self.node, tensor)
        self._graph = _function("ggml_new_graph", _P, _P)(self._context)
        _function("ggml_build_forward_expand", None, _P, _P)(self._graph, self.node)
        self._shape = (streams, rows, heads, size)

    def _tensor(self, kind: int, shape: tuple[int, ...], values: Any) -> int:
        new = _function("ggml_new_tensor_4d", _P, _P, ctypes.c_int, _I64, _I64, _I64, _I64)
        tensor: int = new(self._context, kind, *shape)
        values = np.ascontiguousarray(values)
        ctypes.memmove(self._data(tensor), values.ctypes.data, values.nbytes)
        return tensor

    @staticmethod
    def _data(tensor: int) -> int:
        address: int = _function("ggml_get_data", _P, _P)(tensor)
        return address

    def computed(self, hook: LlamaHook | None = None, threads: int = 2) -> Any:
        """Return the result, shape (streams, rows, heads, size), through a hook where one is given."""
        if hook is not None:
            address, user_data = hook.callback
            ask = ctypes.CFUNCTYPE(ctypes.c_bool, _P, ctypes.c_bool, _P)(address)
            assert ask(self.node, True, user_data) is False
        compute = _function("ggml_graph_compute_with_ctx", ctypes.c_int, _P, _P, ctypes.c_int)
        assert compute(self._context, self._graph, threads) == 0
        count = int(np.prod(self._shape))
        pointer = ctypes.cast(self._data(self.node), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (count,)).reshape(self._shape).copy()

    def close(self) -> None:
        """Free the graph."""
        _function("ggml_free", None, _P)(self._context)
