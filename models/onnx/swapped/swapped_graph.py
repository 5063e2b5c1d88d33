"""SwappedGraph: a graph's model with our operators in their places, as bytes for a session."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.models.onnx.libraries import onnx_library
from lowtide.models.onnx.swapped.attender import Attender
from lowtide.models.onnx.swapped.last_rows import LastRows
from lowtide.models.onnx.swapped.multiplier import Multiplier
from lowtide.models.onnx.swapped.product_nodes import ProductNode
from lowtide.models.onnx.swapped.swap import Swap

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OPERATOR_VERSION = 1


class SwappedGraph:
    """Holds the graph of `path` without its external weights; `element` is what attention's rows hold.

    With `widens` an input says how many of the last rows have logits, where the graph leaves one.
    """

    def __init__(
        self, path: Path, swap: Swap, element: str, logits: str, *, widens: bool = False
    ) -> None:
        self._onnx = onnx_library("onnx")
        self._folder = path.parent
        self._swap = swap
        self._element = element
        self._model = self._onnx.load(str(path), load_external_data=False)
        self._logits = logits
        last_rows = LastRows(self._model.graph, logits) if widens else None
        self._last_rows = last_rows if last_rows is not None and last_rows.is_found else None
        self._weights = {weight.name: weight for weight in self._model.graph.initializer}

    @property
    def is_widened(self) -> bool:
        """Whether the graph has the input `last_rows.BEGIN`."""
        return self._last_rows is not None

    def serialised(self, attender: Attender, multiplier: Multiplier | None = None) -> bytes:
        """Return the model in which both compute what is theirs; of its outputs the logits are left.

        A swap with products wants a multiplier.
        """
        onnx, graph = self._onnx, self._model.graph
        ours = {
            node.index: self._attention(layer, attender)
            for layer, node in enumerate(self._swap.layers)
        }
        if multiplier is not None:
            ours |= self._products(multiplier, attender.domain)
        nodes = [
            ours[index] if index in ours else self._theirs(node)
            for index, node in enumerate(graph.node)
            if index in ours or index in self._swap.nodes
        ]
        made = onnx.helper.make_graph(
            nodes,
            graph.name or "decoder",
            self._inputs(),
            self._outputs(),
            [self._weights[name] for name in sorted(self._swap.weights)],
        )
        version = onnx.helper.make_opsetid(attender.domain, OPERATOR_VERSION)
        model = onnx.helper.make_model(
            made,
            opset_imports=[*self._model.opset_import, version],
            ir_version=self._model.ir_version,
        )
        serialised: bytes = model.SerializeToString()
        return serialised

    def _theirs(self, node: Any) -> Any:
        return node if self._last_rows is None else self._last_rows.node(node)

    def _inputs(self) -> list[Any]:
        kept = [port for port in self._model.graph.input if port.name in self._swap.inputs]
        return kept if self._last_rows is None else [*kept, self._last_rows.input()]

    def _outputs(self) -> list[Any]:
        kept = [port for port in self._model.graph.output if port.name == self._logits]
        return kept if self._last_rows is None else list(map(self._last_rows.output, kept))

    def _attention(self, layer: int, attender: Attender) -> Any:
        node = self._swap.layers[layer]
        inputs = [node.query, node.key, node.value, node.bias]
        while not inputs[-1]:
            inputs.pop()
        return self._onnx.helper.make_node(
            attender.operator(self._element),
            inputs,
            [node.output],
            name=f"attention_{layer}",
            domain=attender.domain,
            attender=attender.number,
            layer=layer,
        )

    def _products(self, multiplier: Multiplier, domain: str) -> dict[int, Any]:
        """Nodes for products and look-ups, by the place of the node that each stands for."""
        names: dict[str, int] = {}
        made = {}
        for node in self._swap.products.nodes:
            kind, more = multiplier.look_up_operator, {}
            if isinstance(node, ProductNode):
                kind = multiplier.product_operator
                more = {"rows": names.setdefault(node.rows, len(names))}
            made[node.index] = self._onnx.helper.make_node(
                kind,
                node.reads,
                [node.output],
                name=f"{kind}_{node.index}",
                domain=domain,
                products=multiplier.number,
                matrix=node.matrix,
                **more,
            )
        return made

    def weight(self, name: str) -> NDArray[np.float32] | None:
        """Return a weight as an array of its own; None for ""."""
        import numpy as np

        if not name:
            return None
        array = self._onnx.numpy_helper.to_array(self._weights[name], base_dir=str(self._folder))
        return np.ascontiguousarray(array, np.float32)
