"""lowtide's kernels in an ONNX graph: the custom operators of a rewritten graph.

onnxruntime's session calls them on its own threads (`native/onnx/`). `OnnxAttention` replaces attention: one
call a layer applies the rotary embedding, appends keys and values to the layer's cache, and attends.
`OnnxMatmul` replaces quantised matmuls and embedding lookups, over tiles that are mapped from a file
(`runtime/backends/kernels/repack.py` writes it).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

from lowtide.attention.bindings.counts import KernelCounts
from lowtide.attention.bindings.library import native_library
from lowtide.attention.bindings.matmul import MatrixView
from lowtide.attention.bindings.policy import AttentionKernels
from lowtide.attention.bindings.structs import ScoreRule
from lowtide.models.errors import LowtideError
from lowtide.models.gguf.header.reader import TYPE_NUMBERS
from lowtide.models.onnx.rewrite.plan import RepackPlan
from lowtide.models.onnx.rewrite.rewrite import AttentionBackend, LayerArrays, MatmulBackend

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


ELEMENTS = {"float16": 0, "float32": 3}
"""The C++ `KvType` of an array's elements."""
OPERATORS = {"float16": "AttentionFp16", "float32": "Attention"}


class _Layer(ctypes.Structure):
    """The C++ `OnnxLayer`, field for field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "k_cache v_cache cosines sines".split()),
        *(
            (name, ctypes.c_int32)
            for name in (
                "cache_type num_slots num_heads num_kv_heads head_dim rotary_pairs interleaved "
                "is_packed is_causal window mask"
            ).split()
        ),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


class _Counts(ctypes.Structure):
    """The C++ `OnnxCounts`."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in "keys_read keys_visible nodes nanoseconds scratch_bytes".split()
    ]


class OnnxAttention(AttentionKernels, AttentionBackend):
    """The attention of one model on `threads` threads; `kernels` names an instruction set (None: the fastest).

    Raises `LowtideError` if this build and processor do not have these kernels.
    """

    domain = "lowtide"

    def __init__(self, threads: int, kernels: str | None = None) -> None:
        library = _declared(native_library())
        self._attend = library.lowtide_onnx_new(kernels.encode() if kernels else None, threads)
        if not self._attend:
            raise LowtideError(
                f"lowtide's attention cannot run here: no {kernels or 'usable'} kernels, or no {threads} threads"
            )
        super().__init__(library, library.lowtide_onnx_policy(self._attend))
        self.library = Path(library._name)
        self.number = self._library.lowtide_onnx_handle(self._attend)
        self._layers: list[LayerArrays] = []

    @property
    def kernels(self) -> str:
        """The instruction set in use."""
        name: bytes = self._library.lowtide_onnx_kernels(self._attend)
        return name.decode()

    @property
    def supports_bf16(self) -> bool:
        """Whether these kernels can multiply in bfloat16."""
        return bool(self._library.lowtide_onnx_supports_bf16(self._attend))

    def set_threads(self, num_threads: int) -> None:
        """Use at most so many of the threads in the next passes."""
        self._library.lowtide_onnx_set_threads(self._attend, num_threads)

    def operator(self, element: str) -> str:
        """Return the operator's name for float32 or float16."""
        return OPERATORS[element]

    def score_prompt(self, layer: int, rule: ScoreRule, *, is_last: bool) -> None:
        """End forward passes in the attention of `layer`; the last pass of a prompt scores its keys.

        Such a pass `has_ended`; its logits mean nothing.
        """
        self._library.lowtide_onnx_score_prompt(self._attend, layer, ctypes.byref(rule), is_last)

    def run_whole_passes(self) -> None:
        """Run forward passes through all layers again."""
        self._library.lowtide_onnx_score_prompt(self._attend, -1, None, False)

    def prompt_scores(self, num_keys: int) -> NDArray[np.float32] | None:
        """Return the scores of the first `num_keys` keys; None if the last pass did not score them."""
        import numpy as np

        scores = np.empty(num_keys, np.float32)
        num_made = self._library.lowtide_onnx_prompt_scores(
            self._attend, scores.ctypes.data, num_keys
        )
        return scores if num_made >= num_keys else None

    @property
    def has_ended(self) -> bool:
        """Whether the last pass ended in a layer because of `score_prompt`."""
        return bool(self._attend and self._library.lowtide_onnx_has_ended(self._attend))

    def counts(self) -> KernelCounts:
        """Return what was attended to so far; all layers are native."""
        counts = self._library.lowtide_onnx_counts(self._attend)
        return KernelCounts(
            layers_native=len(self._layers),
            layers_fallback=0,
            nodes_native=counts.nodes,
            nodes_fallback=0,
            seconds=counts.nanoseconds / 1e9,
            scratch_bytes=counts.scratch_bytes,
            keys_read=counts.keys_read,
            keys_visible=counts.keys_visible,
            weight_bytes_evicted=0,
            matmuls_streamed=0,
            matmuls_repacked=0,
            matmul_steps=0,
            repacked_refused=0,
            scores=self.blocks.cost(),
        )

    def bind(self, layers: list[LayerArrays]) -> None:
        """Set every layer's arrays, and keep them alive. Raises `LowtideError` if it is closed."""
        if not self._attend:
            raise LowtideError("this attention was closed with its model: open the model again")
        if layers is self._layers:
            return
        self._layers = layers
        masks: dict[tuple[str, bool, int | None], int] = {}
        described = (_Layer * len(layers))()
        for layer, arrays in enumerate(layers):
            node = arrays.node
            mask = masks.setdefault((node.bias, node.is_causal, node.window), len(masks))
            described[layer] = _described(arrays, mask)
        failure = self._library.lowtide_onnx_set_layers(self._attend, described, len(layers))
        if failure:
            reason = "the kernels do not support its shape" if failure == 2 else "no memory"
            raise LowtideError(f"lowtide's attention cannot run this model: {reason}")

    def begin(self, num_past: int, num_new: int) -> None:
        """Begin a pass; layers that see the same keys share one mask."""
        self._library.lowtide_onnx_begin(self._attend, num_past, num_new)

    def truncate(self, num_slots: int) -> None:
        """Drop what the policy derived from KV slots `num_slots` and later; nothing once closed."""
        if self._attend:
            super().truncate(num_slots)

    def close(self) -> None:
        """Free the kernels' scratch; closing twice is allowed."""
        if self._attend:
            self._library.lowtide_onnx_free(self._attend)
            self._attend = None
        self._layers = []


def _described(arrays: LayerArrays, mask: int) -> _Layer:
    node = arrays.node
    layer = _Layer(
        k_cache=arrays.key_cache.ctypes.data,
        v_cache=arrays.value_cache.ctypes.data,
        cache_type=ELEMENTS[str(arrays.key_cache.dtype)],
        num_slots=min(len(a) for a in (arrays.key_cache, arrays.cosines) if a is not None),
        num_heads=node.num_heads,
        num_kv_heads=node.num_kv_heads,
        head_dim=node.head_dim,
        interleaved=node.is_interleaved,
        is_packed=node.has_packed_qkv,
        is_causal=node.is_causal,
        window=node.window or 0,
        mask=mask,
        scale=node.scale,
        softcap=node.softcap,
    )
    if arrays.cosines is not None and arrays.sines is not None:
        layer.cosines, layer.sines = arrays.cosines.ctypes.data, arrays.sines.ctypes.data
        layer.rotary_pairs = arrays.cosines.shape[1]
    return layer


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.lowtide_onnx_new.restype = pointer
    library.lowtide_onnx_new.argtypes = [ctypes.c_char_p, number]
    library.lowtide_onnx_free.restype = None
    library.lowtide_onnx_free.argtypes = [pointer]
    library.lowtide_onnx_supports_bf16.argtypes = [pointer]
    library.lowtide_onnx_kernels.restype = ctypes.c_char_p
    library.lowtide_onnx_kernels.argtypes = [pointer]
    library.lowtide_onnx_handle.restype = ctypes.c_int64
    library.lowtide_onnx_handle.argtypes = [pointer]
    library.lowtide_onnx_set_layers.argtypes = [pointer, pointer, number]
    library.lowtide_onnx_policy.restype = pointer
    library.lowtide_onnx_policy.argtypes = [pointer]
    library.lowtide_onnx_set_threads.restype = None
    library.lowtide_onnx_set_threads.argtypes = [pointer, number]
    library.lowtide_onnx_begin.restype = None
    library.lowtide_onnx_begin.argtypes = [pointer, number, number]
    library.lowtide_onnx_score_prompt.restype = None
    library.lowtide_onnx_score_prompt.argtypes = [pointer, number, pointer, number]
    library.lowtide_onnx_has_ended.argtypes = [pointer]
    library.lowtide_onnx_prompt_scores.argtypes = [pointer, pointer, number]
    library.lowtide_onnx_counts.restype = _Counts
    library.lowtide_onnx_counts.argtypes = [pointer]
    return library


class _MatmulCounts(ctypes.Structure):
    """The C++ `OnnxMatmulCounts`."""

    _fields_ = [(name, ctypes.c_int64) for name in ("nodes", "scratch_bytes")]


class OnnxMatmul(MatmulBackend):
    """The repacked matrices of `form` in the file `tiles`, for passes of at most `batch_size` tokens.

    Raises `LowtideError` if there is no memory for the rows, or the file is too short.
    """

    matmul_operator = "RepackedMatMul"
    gather_operator = "RepackedGather"

    def __init__(self, form: RepackPlan, tiles: Path, batch_size: int, threads: int) -> None:
        import numpy as np

        self._library = _matmul_declared(native_library())
        self._tiles = np.memmap(tiles, np.uint8, "r")
        *starts, end = form.offsets
        if len(self._tiles) < end:
            raise LowtideError(
                f"{tiles} has {len(self._tiles)} bytes of repacked weights; it must have {end}: delete it, "
                "and it is written again"
            )
        address = self._tiles.ctypes.data
        matrices = form.rewrite.matmuls.matrices
        described = (MatrixView * len(matrices))(
            *(
                MatrixView(
                    TYPE_NUMBERS[matrix.type_name],
                    matrix.num_rows,
                    matrix.num_columns,
                    address + start,
                )
                for matrix, start in zip(matrices, starts, strict=True)
            )
        )
        self._products = self._library.lowtide_onnx_matmul_new(
            described, len(described), batch_size, threads
        )
        if not self._products:
            raise LowtideError(
                f"lowtide's matmul cannot run here: no memory for {batch_size} rows, or no kernels"
            )
        self.number = self._library.lowtide_onnx_matmul_handle(self._products)

    def set_threads(self, num_threads: int) -> None:
        """Use at most so many of the threads in the next passes."""
        self._library.lowtide_onnx_matmul_set_threads(self._products, num_threads)

    def begin(self) -> None:
        """Drop the rows of the last pass."""
        self._library.lowtide_onnx_matmul_begin(self._products)

    @property
    def scratch_bytes(self) -> int:
        """Bytes of a pass's rows in 8 bits."""
        return int(self._library.lowtide_onnx_matmul_counts(self._products).scratch_bytes)

    def close(self) -> None:
        """Free the rows and unmap the file; closing twice is allowed."""
        if self._products:
            self._library.lowtide_onnx_matmul_free(self._products)
            self._products = None
            del self._tiles


def _matmul_declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.lowtide_onnx_matmul_new.restype = pointer
    library.lowtide_onnx_matmul_new.argtypes = [pointer, number, number, number]
    library.lowtide_onnx_matmul_free.restype = None
    library.lowtide_onnx_matmul_free.argtypes = [pointer]
    library.lowtide_onnx_matmul_set_threads.restype = None
    library.lowtide_onnx_matmul_set_threads.argtypes = [pointer, number]
    library.lowtide_onnx_matmul_handle.restype = ctypes.c_int64
    library.lowtide_onnx_matmul_handle.argtypes = [pointer]
    library.lowtide_onnx_matmul_begin.restype = None
    library.lowtide_onnx_matmul_begin.argtypes = [pointer]
    library.lowtide_onnx_matmul_counts.restype = _MatmulCounts
    library.lowtide_onnx_matmul_counts.argtypes = [pointer]
    return library
