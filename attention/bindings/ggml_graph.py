"""GgmlGraph: one node in a graph of ggml's own, computed by llama.cpp's kernels or by lowtide's, to compare them.

The node has the shape of a model's, and its inputs are zeros: what the kernels do does not depend on the values.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from typing import Any

from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.models.errors import LowtideError
from lowtide.models.gguf.header.reader import TYPE_NUMBERS
from lowtide.models.gguf.llama_cpp import llama_library

WEIGHTS_NAME = "weights"
"""The name of a matmul's matrix, for `LlamaHook.read_repacked`."""
_P, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_F32, _F16, _I64 = 0, 1, ctypes.c_int64
_SLACK_BYTES = 1 << 18
"""Tensors, the graph and the work buffer of a node, beside the tensors' data."""
_BUFFER_FIELD = 8
"""Where a `ggml_tensor` has its buffer, behind its type."""
_EXTRA_BUFFERS = b"ggml_backend_dev_get_extra_bufts"


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", _SIZE), ("mem_buffer", _P), ("no_alloc", ctypes.c_bool)]


def _call(name: str, result: Any, *arguments: tuple[Any, Any]) -> Any:
    """Call a function of ggml with arguments of these types."""
    types, values = [kind for kind, _ in arguments], [value for _, value in arguments]
    return ctypes.CFUNCTYPE(result, *types)(llama_library().address(name))(*values)


class GgmlGraph:
    """A graph of one node, which `seconds` computes. Close it to free its memory."""

    def __init__(self, num_bytes: int) -> None:
        self._buffer: int | None = None
        self._backend = 0
        self._context = self._new_context(num_bytes + _SLACK_BYTES)
        self._device = _call("ggml_backend_dev_by_type", _P, (_INT, 0))
        self._backend = _call("ggml_backend_dev_init", _P, (_P, self._device), (_P, None))
        set_threads = self._function_of_processor(b"ggml_backend_set_n_threads")
        if not self._backend or not set_threads:
            self.close()
            raise LowtideError("llama.cpp has no backend for the processor")
        ctypes.CFUNCTYPE(None, _P, _INT)(set_threads)(self._backend, 1)
        self._compute = ctypes.CFUNCTYPE(_INT, _P, _P)(
            llama_library().address("ggml_backend_graph_compute")
        )
        self._weights: int | None = None
        self._node = 0
        self._graph = 0

    @classmethod
    def matmul(cls, kind: str, num_rows: int, num_columns: int, num_tokens: int) -> GgmlGraph:
        """Make a node that multiplies the activations of `num_tokens` with a matrix of the type `kind`."""
        weight_bytes = _call(
            "ggml_row_size", _SIZE, (_INT, TYPE_NUMBERS[kind]), (_I64, num_columns)
        )
        activations = 4 * num_tokens * (2 * num_columns + num_rows)
        made = cls(2 * activations + num_rows * weight_bytes)
        made._weights = made._tensor(
            TYPE_NUMBERS[kind], num_columns, num_rows, name=WEIGHTS_NAME.encode()
        )
        rows = made._tensor(_F32, num_columns, num_tokens)
        made._finish(_call("ggml_mul_mat", _P, *made._pointers(made._weights, rows)))
        return made

    @classmethod
    def attention(
        cls, num_heads: int, num_kv_heads: int, head_dim: int, num_keys: int, num_tokens: int
    ) -> GgmlGraph:
        """Make a node in which `num_tokens` attend to `num_keys` keys, all of them."""
        cache = 4 * num_kv_heads * num_keys * head_dim
        made = cls(4 * cache + 32 * num_heads * head_dim * num_tokens + 4 * num_keys * num_tokens)
        tensors = (
            made._tensor(_F32, head_dim, num_tokens, num_heads),
            made._tensor(_F16, head_dim, num_keys, num_kv_heads, name=b"cache_k_l0"),
            made._tensor(_F16, head_dim, num_keys, num_kv_heads),
            made._tensor(_F16, num_keys, num_tokens),
        )
        factors = ((ctypes.c_float, value) for value in (1.0, 0.0, 0.0))
        made._finish(_call("ggml_flash_attn_ext", _P, *made._pointers(*tensors), *factors))
        return made

    @staticmethod
    def _new_context(num_bytes: int) -> int:
        made: int | None = _call(
            "ggml_init", _P, (_InitParams, _InitParams(num_bytes, None, False))
        )
        if made is None:
            raise MemoryError
        return made

    def _function_of_processor(self, name: bytes) -> int | None:
        """Return the address of a function that llama.cpp's backend for the processor exports by name."""
        registry = _call("ggml_backend_dev_backend_reg", _P, (_P, self._device))
        found: int | None = _call(
            "ggml_backend_reg_get_proc_address", _P, (_P, registry), (ctypes.c_char_p, name)
        )
        return found

    def _pointers(self, *tensors: int) -> tuple[tuple[Any, Any], ...]:
        return ((_P, self._context), *((_P, tensor) for tensor in tensors))

    def _tensor(self, kind: int, *shape: int, name: bytes = b"") -> int:
        """Make a tensor of zeros."""
        sizes = ((_I64, size) for size in (*shape, *(1,) * (4 - len(shape))))
        made: int = _call("ggml_new_tensor_4d", _P, (_P, self._context), (_INT, kind), *sizes)
        data = _call("ggml_get_data", _P, (_P, made))
        ctypes.memset(data, 0, _call("ggml_nbytes", _SIZE, (_P, made)))
        _call("ggml_set_name", _P, (_P, made), (ctypes.c_char_p, name))
        return made

    def _finish(self, node: int) -> None:
        self._node = node
        self._graph = _call("ggml_new_graph", _P, (_P, self._context))
        _call("ggml_build_forward_expand", None, (_P, self._graph), (_P, node))

    def let_llama_repack(self) -> None:
        """Put the weights into the layout that llama.cpp would choose for them, if there are weights of such a type."""
        device, list_types = self._device, self._function_of_processor(_EXTRA_BUFFERS)
        if not list_types or self._weights is None:
            return
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(list_types)(device)
        field = ctypes.c_void_p.from_address(self._weights + _BUFFER_FIELD)
        for buffer_type in _until_null(listed):
            probe = _call("ggml_backend_buft_alloc_buffer", _P, (_P, buffer_type), (_SIZE, 0))
            field.value = probe
            works = _call(
                "ggml_backend_dev_supports_op", ctypes.c_bool, (_P, device), (_P, self._node)
            )
            field.value = None
            _call("ggml_backend_buffer_free", None, (_P, probe))
            if works:
                self._move_weights(buffer_type, field)
                return

    def _move_weights(self, buffer_type: int, field: ctypes.c_void_p) -> None:
        """Allocate the weights in a buffer of this type, which converts them as they are set."""
        assert self._weights is not None, "only a matmul has weights"
        num_bytes = _call("ggml_nbytes", _SIZE, (_P, self._weights))
        zeros = bytes(num_bytes)
        size = _call(
            "ggml_backend_buft_get_alloc_size", _SIZE, (_P, buffer_type), (_P, self._weights)
        )
        self._buffer = _call("ggml_backend_buft_alloc_buffer", _P, (_P, buffer_type), (_SIZE, size))
        if self._buffer is None:
            raise MemoryError
        base = _call("ggml_backend_buffer_get_base", _P, (_P, self._buffer))
        data = ctypes.c_void_p.from_address(self._data_field())
        data.value = None
        _call(
            "ggml_backend_tensor_alloc", _INT, (_P, self._buffer), (_P, self._weights), (_P, base)
        )
        _call(
            "ggml_backend_tensor_set",
            None,
            (_P, self._weights),
            (ctypes.c_char_p, zeros),
            (_SIZE, 0),
            (_SIZE, num_bytes),
        )

    def _data_field(self) -> int:
        """Return where the weights' tensor has the address of its data: it is found by its value."""
        assert self._weights is not None, "only a matmul has weights"
        data = _call("ggml_get_data", _P, (_P, self._weights))
        words = (ctypes.c_size_t * 48).from_address(self._weights)
        return self._weights + ctypes.sizeof(ctypes.c_size_t) * list(words).index(data)

    def run_in(self, hook: LlamaHook) -> bool:
        """Have lowtide's kernels compute the node from now on; return whether they know it."""
        address, user_data = hook.callback
        ask = ctypes.CFUNCTYPE(ctypes.c_bool, _P, ctypes.c_bool, _P)(address)
        before = hook.counts()
        ask(self._node, True, user_data)
        after = hook.counts()
        return (after.nodes_native, after.matmuls_repacked) > (
            before.nodes_native,
            before.matmuls_repacked,
        )

    def seconds(self) -> float:
        """Compute the node on this thread; return how long that takes."""
        started = time.perf_counter()
        self._compute(self._backend, self._graph)
        return time.perf_counter() - started

    def close(self) -> None:
        """Free the graph and its weights."""
        if self._buffer is not None:
            _call("ggml_backend_buffer_free", None, (_P, self._buffer))
            self._buffer = None
        if self._backend:
            _call("ggml_backend_free", None, (_P, self._backend))
            self._backend = 0
        if self._context:
            _call("ggml_free", None, (_P, self._context))
            self._context = 0


def _until_null(pointers: Any) -> Iterator[int]:
    index = 0
    while pointers and pointers[index]:
        yield pointers[index]
        index += 1
