"""PieceModels: pieces as ONNX models of their own, over the same weight files.

Requires pieces of the graph at `path`. Ensures that each model has the nodes as they are in the graph, and
of weights that lie in other files only where they lie: none is read or copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.models.onnx.cut.pieces import Piece
from lowtide.models.onnx.libraries import onnx_library
from lowtide.models.onnx.spec import GraphPorts

ROWS = "rows"
_BATCH = 1


@dataclass(frozen=True, slots=True)
class ValueType:
    """A value's element type, as onnxruntime names it, and its extents: a number, or a name for one."""

    kind: str
    shape: tuple[int | str | None, ...]

    @property
    def element(self) -> str:
        """Return the element type as numpy names it, "" where it has none."""
        return _ELEMENTS.get(self.kind, "")

    @property
    def row_width(self) -> int | None:
        """The channels of a value that has so many for each row of a pass; None for others."""
        if len(self.shape) != 3 or self.shape[:2] != (_BATCH, ROWS):
            return None
        return self.shape[2] if isinstance(self.shape[2], int) else None


_ELEMENTS = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}
_KINDS = {element: kind for kind, element in _ELEMENTS.items()}


def row_type(element: str, width: int) -> ValueType:
    """Return the type of a value with `width` channels for each row."""
    return ValueType(_KINDS[element], (_BATCH, ROWS, width))


class PieceModels:
    """Writes the model of one piece after the other; the graph is held meanwhile."""

    def __init__(self, path: Path, ports: GraphPorts) -> None:
        self._onnx = onnx_library("onnx")
        self._model = self._onnx.load(str(path), load_external_data=False)
        self._weights = {weight.name: weight for weight in self._model.graph.initializer}
        ids = {ports.token_ids: (_BATCH, ROWS)}
        if ports.position_ids is not None:
            ids[ports.position_ids] = (_BATCH, ROWS)
        if ports.attention_mask is not None:
            ids[ports.attention_mask] = (_BATCH, "tokens")
        kinds = {i.name: i.type.tensor_type.elem_type for i in self._model.graph.input}
        name_of = self._onnx.helper.tensor_dtype_to_np_dtype
        self._graph_inputs = {
            name: ValueType(_KINDS[str(name_of(kinds[name]))], shape) for name, shape in ids.items()
        }

    def serialised(self, piece: Piece, types: dict[str, ValueType]) -> bytes:
        """Return the piece's model; `types` are of the values that come in from pieces before."""
        onnx, source = self._onnx, self._model
        known = {**self._graph_inputs, **types}
        inputs = [self._value(name, known[name]) for name in piece.inputs]
        outputs = [onnx.ValueInfoProto(name=name) for name in piece.outputs]
        graph = onnx.helper.make_graph(
            [source.graph.node[index] for index in piece.nodes],
            "piece",
            inputs,
            outputs,
            [self._weights[name] for name in piece.weights],
        )
        made = onnx.helper.make_model(
            graph, opset_imports=source.opset_import, ir_version=source.ir_version
        )
        serialised: bytes = made.SerializeToString()
        return serialised

    def _value(self, name: str, value: ValueType) -> Any:
        import numpy as np

        kind = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(value.element))
        return self._onnx.helper.make_tensor_value_info(name, kind, value.shape)

    def weight(self, name: str, folder: Path) -> Any:
        """Return a weight as an array of its own."""
        import numpy as np

        array = self._onnx.numpy_helper.to_array(self._weights[name], base_dir=str(folder))
        return np.ascontiguousarray(array, np.float32)
