"""PieceAttention: our kernels between the pieces of a graph that is cut.

The rows of a pass are turned (rotary embedding), appended to the layer's cache and attended by C++
(`native/piece_attend.cpp`), in one call a layer. Knows no session and no model; policies install
themselves here as in `GraphHook`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lowtide.attention.graph_hook import HookCounts
from lowtide.attention.native_library import native_library
from lowtide.attention.piece_masks import PieceMasks
from lowtide.attention.selection_rule import SelectionRule
from lowtide.models.errors import ForwardError, LowtideError
from lowtide.models.onnx.cut.attender import Attender, LayerArrays

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ELEMENTS = {"float16": 0, "float32": 3}
"""The C++ `KvType` of what arrays hold."""


class _Rows(ctypes.Structure):
    """The C++ `PieceRows`, field for field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "q k v out".split()),
        *((f"{name}_row_stride", ctypes.c_size_t) for name in "q k v out".split()),
        *((name, ctypes.c_void_p) for name in "k_cache v_cache cosines sines mask".split()),
        ("mask_row_stride", ctypes.c_size_t),
        ("sinks", ctypes.c_void_p),
        *(
            (name, ctypes.c_int32)
            for name in (
                "element cache_type layer num_rows num_past num_heads num_kv_heads head_size "
                "rotary_pairs interleaved"
            ).split()
        ),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


class _Counts(ctypes.Structure):
    """The C++ `PieceCounts`."""

    _fields_ = [
        (name, ctypes.c_int64) for name in "keys_read keys_held nanoseconds scratch_bytes".split()
    ]


class PieceAttention(Attender):
    """Attends for one model on `threads` threads; `kernels` names an instruction set, None takes the best.

    Raises `LowtideError` where this build and processor have no such kernels.
    """

    def __init__(self, threads: int, kernels: str | None = None) -> None:
        self._library = _declared(native_library())
        self._pieces = self._library.lowtide_pieces_new(
            kernels.encode() if kernels else None, threads
        )
        if not self._pieces:
            raise LowtideError(
                f"our attention cannot run here: no {kernels or 'usable'} kernels, or no {threads} threads"
            )
        self._layers: list[LayerArrays] = []
        self._rows: list[_Rows] = []
        self._masks = PieceMasks()
        self._num_nodes = 0

    @property
    def kernels(self) -> str:
        """The instruction set in use."""
        name: bytes = self._library.lowtide_pieces_kernels(self._pieces)
        return name.decode()

    @property
    def can_round(self) -> bool:
        """Whether these kernels can multiply in bfloat16."""
        return bool(self._library.lowtide_pieces_can_round(self._pieces))

    def set_roles(self, roles: bytes, rule: SelectionRule) -> None:
        """Set what each layer does in a sparse pass (`LayerRole`); call it between passes."""
        if self._library.lowtide_pieces_set_roles(
            self._pieces, roles, len(roles), ctypes.byref(rule)
        ):
            raise MemoryError

    def start_pass(self, *, sparse: bool, refresh: bool = True, rounded: bool = False) -> None:
        """Say whether the passes from now on are sparse, and whether they choose their keys anew.

        `rounded` has a prompt's rows multiplied in bfloat16, where `can_round`.
        """
        self._library.lowtide_pieces_start_pass(self._pieces, sparse, refresh, rounded)

    def counts(self) -> HookCounts:
        """Return what was attended to so far; all layers are ours."""
        counts = self._library.lowtide_pieces_counts(self._pieces)
        return HookCounts(
            layers_ours=len(self._layers),
            layers_theirs=0,
            nodes_ours=self._num_nodes,
            nodes_theirs=0,
            seconds=counts.nanoseconds / 1e9,
            scratch_bytes=counts.scratch_bytes,
            keys_read=counts.keys_read,
            keys_held=counts.keys_held,
            weight_bytes_given_back=0,
            products_sliced=0,
            products_packed=0,
            packed_refused=0,
        )

    def bind(self, layers: list[LayerArrays]) -> None:
        """Know every layer's arrays; they are kept. Raises `LowtideError` where it is closed."""
        if not self._pieces:
            raise LowtideError(
                "our attention is closed with the model that it attended for: make another"
            )
        self._layers = layers
        self._rows = [_rows_of(layer, arrays) for layer, arrays in enumerate(layers)]

    def start(
        self, num_past: int, num_rows: int, biases: Mapping[str, NDArray[np.generic]]
    ) -> None:
        """Begin a pass: one mask for all layers that see the same keys."""
        self._masks.start(num_past, num_rows, biases)
        for rows, arrays in zip(self._rows, self._layers, strict=True):
            mask = self._masks.of(arrays.node)
            rows.num_past, rows.num_rows = num_past, num_rows
            rows.mask, rows.mask_row_stride = mask.address, mask.row_bytes

    def attend(self, layer: int) -> None:
        """Append and attend; raises `ForwardError` where there is no memory for it."""
        failure = self._library.lowtide_pieces_attend(self._pieces, ctypes.byref(self._rows[layer]))
        if failure:
            reason = "of its shape" if failure == 2 else "for want of memory"
            raise ForwardError(f"the attention of layer {layer} failed {reason}")
        self._num_nodes += 1

    def close(self) -> None:
        """Free the kernels' threads and scratch; closing twice is allowed."""
        if self._pieces:
            self._library.lowtide_pieces_free(self._pieces)
            self._pieces = None
        self._layers, self._rows = [], []


def _rows_of(layer: int, arrays: LayerArrays) -> _Rows:
    node = arrays.node
    rows = _Rows(
        layer=layer,
        element=ELEMENTS[str(arrays.query.dtype)],
        cache_type=ELEMENTS[str(arrays.key_cache.dtype)],
        num_heads=node.num_heads,
        num_kv_heads=node.num_kv_heads,
        head_size=node.head_size,
        interleaved=node.is_interleaved,
        scale=node.scale,
        softcap=node.softcap,
        k_cache=arrays.key_cache.ctypes.data,
        v_cache=arrays.value_cache.ctypes.data,
    )
    places = {"q": arrays.query, "k": arrays.key, "v": arrays.value, "out": arrays.out}
    for name, array in places.items():
        setattr(rows, name, array.ctypes.data)
        setattr(rows, f"{name}_row_stride", array.strides[0])
    if arrays.cosines is not None and arrays.sines is not None:
        rows.cosines, rows.sines = arrays.cosines.ctypes.data, arrays.sines.ctypes.data
        rows.rotary_pairs = arrays.cosines.shape[1]
    return rows


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.lowtide_pieces_new.restype = pointer
    library.lowtide_pieces_new.argtypes = [ctypes.c_char_p, number]
    library.lowtide_pieces_free.restype = None
    library.lowtide_pieces_free.argtypes = [pointer]
    library.lowtide_pieces_can_round.argtypes = [pointer]
    library.lowtide_pieces_kernels.restype = ctypes.c_char_p
    library.lowtide_pieces_kernels.argtypes = [pointer]
    library.lowtide_pieces_set_roles.argtypes = [pointer, ctypes.c_char_p, number, pointer]
    library.lowtide_pieces_start_pass.restype = None
    library.lowtide_pieces_start_pass.argtypes = [pointer, number, number, number]
    library.lowtide_pieces_attend.argtypes = [pointer, pointer]
    library.lowtide_pieces_counts.restype = _Counts
    library.lowtide_pieces_counts.argtypes = [pointer]
    return library
