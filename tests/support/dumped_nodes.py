"""Copies q, k, v and mask of a real model's attention nodes out of llama.cpp's graph, as arrays."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from kernel_calls import AttentionInputs

from lowtide.models.gguf.llama_cpp import llama_library

_P = ctypes.c_void_p


class _Tensor(ctypes.Structure):
    """The part of ggml's tensor that is read here, as the native library declares it."""


_Tensor._fields_ = [
    ("type", ctypes.c_int32),
    ("buffer", _P),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int32),
    ("op_params", ctypes.c_float * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", _P),
    ("view_offs", ctypes.c_size_t),
    ("data", _P),
]


class DumpedNodes:
    """An evaluation callback that keeps every attention node of the passes while `recording` is set."""

    def __init__(self) -> None:
        self.recording = False
        self.nodes: list[AttentionInputs] = []
        op_name = llama_library().address("ggml_op_name")
        self._op_name = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_int32)(op_name)
        self._keep = ctypes.CFUNCTYPE(ctypes.c_bool, _P, ctypes.c_bool, _P)(self._on_node)

    @property
    def callback(self) -> tuple[int, int]:
        """For `LoadOptions.eval_callback`."""
        address = ctypes.cast(self._keep, _P).value
        assert address is not None
        return address, 0

    def _on_node(self, address: int, ask: bool, _user_data: int) -> bool:
        node = _Tensor.from_address(address)
        is_attention = self._op_name(node.op) == b"FLASH_ATTN_EXT"
        if ask:
            return self.recording and is_attention
        self.nodes.append(_inputs(node))
        return True


def _inputs(node: _Tensor) -> AttentionInputs:
    q, k, v, mask = (node.src[i].contents for i in range(4))
    return AttentionInputs(
        q=_array(q, np.float32).transpose(1, 0, 2).copy(),
        k=_array(k, np.float16).transpose(1, 0, 2).copy(),
        v=_array(v, np.float16).transpose(1, 0, 2).copy(),
        mask=_array(mask, np.float16)[0, : q.ne[1]].copy(),
        value_dim=v.ne[0],
        scale=node.op_params[0],
        softcap=node.op_params[2],
    )


def _array(tensor: _Tensor, kind: Any) -> Any:
    """Dimensions 2, 1 and 0 of a tensor as an array over its own memory."""
    shape = [tensor.ne[i] for i in (2, 1, 0)]
    strides = [tensor.nb[i] for i in (2, 1, 0)]
    num_bytes = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + strides[2]
    memory = (ctypes.c_char * num_bytes).from_address(tensor.data)
    return np.ndarray(shape, kind, buffer=memory, strides=strides)
