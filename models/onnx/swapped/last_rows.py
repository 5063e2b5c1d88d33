"""LastRows: where a graph leaves a pass's last row for its logits, so that a few more can be left.

Requires a graph whose logits are of one row. Ensures that behind that place every operator takes rows one
by one: logits of more rows are then those of each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowtide.models.onnx.libraries import onnx_library

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BEGIN = "lowtide_logits_begin"
"""The input that says where the rows with logits begin, from a pass's end: -1 leaves the last one."""
ROW_BY_ROW = frozenset(
    "Add Cast Div LayerNormalization MatMul MatMulNBits Mul SimplifiedLayerNormalization Tanh".split()
)
ROWS_AXIS = 1


class LastRows:
    """Widens the Slice of one graph, as onnx has it; `is_found` says whether there is such a one."""

    def __init__(self, graph: Any, logits: str) -> None:
        self._onnx = onnx_library("onnx")
        self._weights = {weight.name: weight for weight in graph.initializer}
        self._maker = {name: node for node in graph.node for name in node.output if name}
        self._slice = self._found(logits)

    @property
    def is_found(self) -> bool:
        """Whether more rows can be left."""
        return self._slice is not None

    def node(self, node: Any) -> Any:
        """Return a node of the graph as it is to be: the Slice begins where the input says."""
        if node is not self._slice:
            return node
        widened = self._onnx.NodeProto()
        widened.CopyFrom(node)
        widened.input[1] = BEGIN
        return widened

    def input(self) -> Any:
        """Return the graph's further input."""
        return self._onnx.helper.make_tensor_value_info(BEGIN, self._onnx.TensorProto.INT64, [1])

    def output(self, port: Any) -> Any:
        """Return the logits' port, of any number of rows."""
        widened = self._onnx.ValueInfoProto()
        widened.CopyFrom(port)
        widened.type.tensor_type.shape.dim[ROWS_AXIS].Clear()
        return widened

    def _found(self, logits: str) -> Any:
        """The Slice behind which there is nothing but operators that take rows one by one."""
        name = logits
        while (node := self._maker.get(name)) is not None:
            if node.op_type == "Slice":
                return node if self._leaves_last_row(node) else None
            made = [given for given in node.input if given in self._maker]
            if node.op_type not in ROW_BY_ROW or len(made) != 1:
                return None
            name = made[0]
        return None

    def _leaves_last_row(self, node: Any) -> bool:
        values = [self._value(name) for name in node.input[1:]]
        if len(values) < 3 or any(value is None or value.size != 1 for value in values):
            return False
        begin, end, axis, *step = (int(value.item()) for value in values if value is not None)
        return begin == -1 and end > 0 and axis == ROWS_AXIS and step in ([], [1])

    def _value(self, name: str) -> NDArray[np.generic] | None:
        weight = self._weights.get(name)
        if weight is None or weight.data_location == self._onnx.TensorProto.EXTERNAL:
            return None
        value: NDArray[np.generic] = self._onnx.numpy_helper.to_array(weight)
        return value
