"""GraphNodes: an ONNX graph as it grows, node by node. Knows no decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowtide.models.onnx.libraries import onnx_library

MICROSOFT = "com.microsoft"
OPSET, MICROSOFT_OPSET, IR_VERSION = 21, 1, 10
Extent = int | str


class GraphNodes:
    """Nodes, constants and the graph's inputs and outputs; outputs of nodes are named after their kinds."""

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
        """Append a node; an output "" is given a name, None is left out. Return all names."""
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
        """Return the name of a list of whole numbers."""
        key = ("list", *numbers)
        return self._constant(key, [len(numbers)], self._types.INT64, numbers)

    def scalar(self, number: int | float) -> str:
        """Return the name of a single number, int64 or float32."""
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
        """Take a tensor's entry; return its name."""
        self._weights.append(entry)
        return str(entry.name)

    def vector(self, name: str, numbers: Any) -> str:
        """Take a short array of float32, which lies in the graph itself; return its name."""
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
        """Return the file's bytes, with `notes` as its metadata."""
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
