"""Writes ONNX graphs: nodes, external data, and quantised matrices with the nodes that read them.

`GraphNodes` and `ExternalData` are the graph file and the file of weights beside it; `MatrixWriter` puts GGUF
matrices into both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO

from lowtide.models.convert.dequantize import FLOAT_TYPES, GgufWeights
from lowtide.models.onnx.config import onnx_library

if TYPE_CHECKING:
    from numpy.typing import NDArray


PAGE = 4096
"""Tensors begin at multiples of this, so that onnxruntime can map them ("ExternalDataInfo" of onnx)."""


class ExternalData:
    """The file beside a graph with its weights, written front to back; the graph refers to it as `location`."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self._file = file
        self._location = location
        self._end = 0

    def begin(self) -> int:
        """Pad to the next page and return its offset."""
        padding = -self._end % PAGE
        self._file.write(b"\0" * padding)
        self._end += padding
        return self._end

    def append(self, array: NDArray[Any]) -> None:
        """Append an array."""
        import numpy as np

        self._file.write(np.ascontiguousarray(array).data)
        self._end += array.nbytes

    def tensor(self, name: str, shape: tuple[int, ...], element: str, start: int) -> Any:
        """Return the graph's entry for a tensor whose data begins at `start`."""
        onnx = onnx_library("onnx")
        kind = {"uint8": onnx.TensorProto.UINT8, "float32": onnx.TensorProto.FLOAT}[element]
        entry = onnx.TensorProto(
            name=name, data_type=kind, dims=shape, data_location=onnx.TensorProto.EXTERNAL
        )
        length = prod(shape) * (1 if element == "uint8" else 4)
        for key, value in (("location", self._location), ("offset", start), ("length", length)):
            entry.external_data.add(key=key, value=str(value))
        return entry


MICROSOFT = "com.microsoft"
OPSET, MICROSOFT_OPSET, IR_VERSION = 21, 1, 10
Extent = int | str


class GraphNodes:
    """An ONNX graph under construction; outputs of nodes are named after their operators."""

    def __init__(self) -> None:
        self._helper = onnx_library("onnx.helper")
        self._numpy_helper = onnx_library("onnx.numpy_helper")
        self._types = onnx_library("onnx").TensorProto
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._weights: list[Any] = []
        self._constants: dict[tuple[object, ...], str] = {}

    def add(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output; return the output's name."""
        (output,) = self.add_many(kind, inputs, ("",), domain=domain, **attributes)
        return output

    def add_many(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: Sequence[str | None],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Append a node and return the names of its outputs: "" gets a new name, None is left out."""
        name = f"{kind}_{len(self._nodes)}"
        names = [
            "" if output is None else output or f"{name}_{index}"
            for index, output in enumerate(outputs)
        ]
        self._nodes.append(
            self._helper.make_node(kind, inputs, names, name=name, domain=domain, **attributes)
        )
        return names

    def constant(self, *numbers: int) -> str:
        """Return the name of a constant int64 list."""
        key = ("list", *numbers)
        return self._constant(key, [len(numbers)], self._types.INT64, numbers)

    def scalar(self, number: int | float) -> str:
        """Return the name of a constant number, int64 or float32."""
        kind = self._types.INT64 if isinstance(number, int) else self._types.FLOAT
        return self._constant(("scalar", kind, number), [], kind, [number])

    def _constant(
        self, key: tuple[object, ...], shape: list[int], kind: int, numbers: Sequence[float]
    ) -> str:
        if key not in self._constants:
            name = self._constants[key] = f"constant_{len(self._constants)}"
            self._weights.append(self._helper.make_tensor(name, kind, shape, numbers))
        return self._constants[key]

    def weight(self, entry: Any) -> str:
        """Add a tensor's entry; return its name."""
        self._weights.append(entry)
        return str(entry.name)

    def vector(self, name: str, numbers: Any) -> str:
        """Add a short float32 array inside the graph file; return its name."""
        return self.weight(self._numpy_helper.from_array(numbers, name))

    def input(self, name: str, element: str, shape: Sequence[Extent]) -> str:
        """Declare an input of the graph ("int64" or "float32"); return its name."""
        self._inputs.append(self._port(name, element, shape))
        return name

    def output(self, name: str, shape: Sequence[Extent]) -> str:
        """Declare an output of the graph, float32; return its name."""
        self._outputs.append(self._port(name, "float32", shape))
        return name

    def _port(self, name: str, element: str, shape: Sequence[Extent]) -> Any:
        kind = self._types.INT64 if element == "int64" else self._types.FLOAT
        return self._helper.make_tensor_value_info(name, kind, shape)

    def model(self, name: str, notes: dict[str, str]) -> bytes:
        """Return the bytes of the graph file, with `notes` as its metadata."""
        graph = self._helper.make_graph(
            self._nodes, name, self._inputs, self._outputs, self._weights
        )
        opsets = [("", OPSET), (MICROSOFT, MICROSOFT_OPSET)]
        model = self._helper.make_model(
            graph,
            producer_name="lowtide",
            ir_version=IR_VERSION,
            opset_imports=[self._helper.make_opsetid(*opset) for opset in opsets],
        )
        self._helper.set_model_props(model, notes)
        return bytes(model.SerializeToString())


INT8_ACTIVATIONS, FLOAT_ACTIVATIONS = 4, 1
"""MatMulNBits' accuracy levels: activations are rounded to 8 bits in blocks, or stay float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMatrix:
    """A matrix in the external data and its entries in the graph.

    `offsets`, (blocks, rows), is "" where there are none.
    """

    name: str
    rows: int
    columns: int
    bits: int
    block_size: int
    start: int
    quants: str
    scales: str
    offsets: str

    @property
    def row_bytes(self) -> int:
        """The bytes of a row's quants."""
        return self.columns * self.bits // 8


class MatrixWriter:
    """Writes GGUF matrices to the external data and adds the matmuls and lookups that read them.

    Weights with offsets take a second, small matmul: the sums of the activations' blocks times the offsets.
    (MatMulNBits has floating-point zero points for that, but no kernel for them: twenty times slower.)
    `rounded` counts the floating-point matrices that were rounded to 8 bits, by type.
    """

    def __init__(
        self,
        nodes: GraphNodes,
        data: ExternalData,
        weights: GgufWeights,
        *,
        accuracy_level: int,
        advance: Callable[[int], None],
    ) -> None:
        self._nodes = nodes
        self._data = data
        self._weights = weights
        self._accuracy_level = accuracy_level
        self._advance = advance
        self._sums: dict[tuple[str, int], str] = {}
        self.rounded = Counter[str]()

    def store(self, name: str, heads: int = 0) -> StoredMatrix:
        """Write the matrix `name`; `heads` as for `GgufWeights.slices`."""
        import numpy as np

        type_name = self._weights.type_name(name)
        if type_name in FLOAT_TYPES:
            self.rounded[type_name] += 1
        rows, columns = self._weights.shape(name)
        start, scales, offsets = self._data.begin(), [], []
        for part in self._weights.slices(name, heads):
            self._data.append(part.packed())
            scales.append(part.scales)
            if part.offsets is not None:
                offsets.append(part.offsets)
            self._advance(self._weights.num_bytes(name) * len(part.quants) // rows)
        bits, block_size = part.bits, part.block_size
        num_blocks = columns // block_size
        stored = self._entry(f"{name}.scales", np.concatenate(scales))
        shape = (rows, num_blocks, block_size * bits // 8)
        quants = self._nodes.weight(self._data.tensor(f"{name}.quants", shape, "uint8", start))
        transposed = self._entry(f"{name}.offsets", np.concatenate(offsets).T) if offsets else ""
        return StoredMatrix(
            name=name,
            rows=rows,
            columns=columns,
            bits=bits,
            block_size=block_size,
            start=start,
            quants=quants,
            scales=stored,
            offsets=transposed,
        )

    def table(self, name: str, numbers: object) -> str:
        """Write a float32 table; return its name."""
        return self._entry(name, numbers)

    def _entry(self, name: str, numbers: object) -> str:
        import numpy as np

        array = np.asarray(numbers, np.float32)
        start = self._data.begin()
        self._data.append(array)
        return self._nodes.weight(self._data.tensor(name, array.shape, "float32", start))

    def matmul(self, x: str, matrix: StoredMatrix, bias: str = "", output: str = "") -> str:
        """Add the product of x, (batch, tokens, columns), and the transposed matrix; return its name."""
        (product,) = self._nodes.add_many(
            "MatMulNBits",
            (x, matrix.quants, matrix.scales, *(("", "", bias) if bias else ())),
            ("" if matrix.offsets else output,),
            domain=MICROSOFT,
            K=matrix.columns,
            N=matrix.rows,
            bits=matrix.bits,
            block_size=matrix.block_size,
            accuracy_level=self._accuracy_level,
        )
        if not matrix.offsets:
            return product
        sums = self._block_sums(x, matrix.block_size)
        correction = self._nodes.add("MatMul", sums, matrix.offsets)
        (summed,) = self._nodes.add_many("Add", (product, correction), (output,))
        return summed

    def _block_sums(self, x: str, block_size: int) -> str:
        key = x, block_size
        if key not in self._sums:
            shape = self._nodes.constant(0, 0, -1, block_size)
            blocks = self._nodes.add("Reshape", x, shape)
            last = self._nodes.constant(-1)
            self._sums[key] = self._nodes.add("ReduceSum", blocks, last, keepdims=0)
        return self._sums[key]

    def lookup(self, token_ids: str, matrix: StoredMatrix) -> str:
        """Add a lookup of the matrix's rows, float32 of (batch, tokens, columns); return its name."""
        flat = self._data.tensor(
            f"{matrix.name}.rows", (matrix.rows, matrix.row_bytes), "uint8", matrix.start
        )
        rows = self._nodes.add(
            "GatherBlockQuantized",
            self._nodes.weight(flat),
            token_ids,
            matrix.scales,
            domain=MICROSOFT,
            bits=matrix.bits,
            block_size=matrix.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        return self._with_offsets(rows, token_ids, matrix) if matrix.offsets else rows

    def _with_offsets(self, rows: str, token_ids: str, matrix: StoredMatrix) -> str:
        nodes = self._nodes
        offsets = nodes.add("Gather", matrix.offsets, token_ids, axis=1)
        by_token = nodes.add("Transpose", offsets, perm=[1, 2, 0])
        column = nodes.add("Unsqueeze", by_token, nodes.constant(-1))
        blocks = nodes.add("Reshape", rows, nodes.constant(0, 0, -1, matrix.block_size))
        summed = nodes.add("Add", blocks, column)
        return nodes.add("Reshape", summed, nodes.constant(0, 0, matrix.columns))
