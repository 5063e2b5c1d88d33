"""OnnxProducts: our matrix kernels in the place of an ONNX graph's quantised products.

A graph's nodes call them from onnxruntime's session, on onnxruntime's threads
(`native/onnx_product_operators.cpp`), over panels that are mapped from a file (`panel_file`). Knows no
session.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from lowtide.attention.native_library import native_library
from lowtide.attention.product_kernels import MatrixView
from lowtide.models.errors import LowtideError
from lowtide.models.gguf_reader import TYPE_NUMBERS
from lowtide.models.onnx.packed_form import PackedForm
from lowtide.models.onnx.swapped.multiplier import Multiplier


class _Counts(ctypes.Structure):
    """The C++ `OnnxProductCounts`."""

    _fields_ = [(name, ctypes.c_int64) for name in ("nodes", "scratch_bytes")]


class OnnxProducts(Multiplier):
    """The packed matrices of `form` in the file `panels`, for passes of `max_rows` rows at most.

    Raises `LowtideError` where there is no memory for the rows, or the file is no such one.
    """

    product_operator = "Product"
    look_up_operator = "Rows"

    def __init__(self, form: PackedForm, panels: Path, max_rows: int, threads: int) -> None:
        import numpy as np

        self._library = _declared(native_library())
        self._panels = np.memmap(panels, np.uint8, "r")
        *starts, end = form.offsets
        if len(self._panels) < end:
            raise LowtideError(
                f"{panels} has {len(self._panels)} bytes of packed weights, {end} are wanted: remove it, "
                "and it is made again"
            )
        address = self._panels.ctypes.data
        matrices = form.swap.products.matrices
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
        self._products = self._library.lowtide_onnx_products_new(
            described, len(described), max_rows, threads
        )
        if not self._products:
            raise LowtideError(
                f"our kernels cannot multiply here: no memory for {max_rows} rows, or no kernels"
            )
        self.number = self._library.lowtide_onnx_products_number(self._products)

    def begin(self) -> None:
        """Forget the last pass's rows."""
        self._library.lowtide_onnx_products_begin(self._products)

    @property
    def num_nodes(self) -> int:
        """How many nodes have been computed, products and look-ups."""
        return int(self._library.lowtide_onnx_products_counts(self._products).nodes)

    @property
    def scratch_bytes(self) -> int:
        """What a pass's rows take in 8 bits."""
        return int(self._library.lowtide_onnx_products_counts(self._products).scratch_bytes)

    def close(self) -> None:
        """Free the rows and let go of the file; closing twice is allowed."""
        if self._products:
            self._library.lowtide_onnx_products_free(self._products)
            self._products = None
            del self._panels


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.lowtide_onnx_products_new.restype = pointer
    library.lowtide_onnx_products_new.argtypes = [pointer, number, number, number]
    library.lowtide_onnx_products_free.restype = None
    library.lowtide_onnx_products_free.argtypes = [pointer]
    library.lowtide_onnx_products_number.restype = ctypes.c_int64
    library.lowtide_onnx_products_number.argtypes = [pointer]
    library.lowtide_onnx_products_begin.restype = None
    library.lowtide_onnx_products_begin.argtypes = [pointer]
    library.lowtide_onnx_products_counts.restype = _Counts
    library.lowtide_onnx_products_counts.argtypes = [pointer]
    return library
