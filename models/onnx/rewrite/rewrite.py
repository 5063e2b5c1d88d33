"""Swap: which nodes of a graph stay when its attention, and products, are ours. Reads headers alone.

Requires the attention nodes, layer by layer. Ensures that what stays is all that the logits depend on, and
that what only attention needed (masks of lengths, caches) does not.

RewrittenGraph: a graph's model with our operators in their places, as bytes for a session.

LastRows: where a graph leaves a pass's last row for its logits, so that a few more can be left.

Requires a graph whose logits are of one row. Ensures that behind that place every operator takes rows one
by one: logits of more rows are then those of each.

Attender: the seam to whatever attends in a graph's place. It is handed in; models know no attention.

Multiplier: the seam to what multiplies in a graph's place. It is handed in; models know no kernel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.models.onnx.config import OnnxConfig, onnx_library
from lowtide.models.onnx.graph import DECOMPOSED, OnnxGraph
from lowtide.models.onnx.rewrite.attention_nodes import (
    AttentionNode,
    CannotRewrite,
    check_layers,
    read_attention_nodes,
)
from lowtide.models.onnx.rewrite.matmul_nodes import MatmulNode, MatmulNodes
from lowtide.models.onnx.spec import GraphPorts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


BRANCHES = frozenset({"If", "Loop", "Scan"})
MOST_INLINE_BYTES = 16 << 20
"""Weights inside of the .onnx file are read into memory to be given on: no more than this."""
LARGEST_HEAD = 256
NO_MATMULS = MatmulNodes()


@dataclass(frozen=True, slots=True, kw_only=True)
class RewritePlan:
    """The nodes that become ours, the places of those that stay, and the weights that these read.

    `inputs` are those of the graph that are still read, `inline_bytes` of weights inside the .onnx file.
    """

    layers: tuple[AttentionNode, ...]
    nodes: frozenset[int]
    weights: frozenset[str]
    inputs: frozenset[str]
    inline_bytes: int
    products: MatmulNodes


def plan_rewrite(
    graph: OnnxGraph,
    ports: GraphPorts,
    config: OnnxConfig,
    products: MatmulNodes = NO_MATMULS,
) -> RewritePlan:
    """Return what is swapped, `products` too.

    Raises `CannotRewrite` with the reason where the graph is left whole.
    """
    branch = next((node.kind for node in graph.nodes if node.kind in BRANCHES), None)
    if branch is not None:
        raise CannotRewrite(f"has branches ({branch})")
    inline = sum(w.num_bytes for w in graph.weights.values() if w.location is None)
    if inline > MOST_INLINE_BYTES:
        raise CannotRewrite("keeps its weights inside the .onnx file, not as external data")
    layers = read_attention_nodes(graph, config)
    if not layers:
        raise CannotRewrite(f"has {DECOMPOSED}")
    check_layers(layers, ports.layers)
    _check_sizes(layers)
    reached, read = _reached(graph, ports, layers, products)
    products = products.among(reached)
    ours = {node.index for node in (*layers, *products.nodes)}
    nodes = frozenset(reached - ours)
    read -= {graph.nodes[index].outputs[0] for index in ours}
    return RewritePlan(
        layers=layers,
        nodes=nodes,
        weights=read & frozenset(graph.weights),
        inputs=read - frozenset(graph.weights) - {n for i in nodes for n in graph.nodes[i].outputs},
        inline_bytes=inline,
        products=products,
    )


def _check_sizes(layers: tuple[AttentionNode, ...]) -> None:
    for node in layers:
        whole_groups = node.num_kv_heads > 0 and node.num_heads % node.num_kv_heads == 0
        if not whole_groups or node.head_size % 16 or node.head_size > LARGEST_HEAD:
            raise CannotRewrite(
                f"has {node.num_heads} heads over {node.num_kv_heads} of size {node.head_size}"
            )


def _reached(
    graph: OnnxGraph,
    ports: GraphPorts,
    layers: tuple[AttentionNode, ...],
    products: MatmulNodes,
) -> tuple[frozenset[int], frozenset[str]]:
    """The nodes that the logits depend on, ours among them, and all values that are read."""
    maker = {name: i for i, node in enumerate(graph.nodes) for name in node.outputs if name}
    attention = {node.index for node in layers}
    ours = {node.index: node.reads for node in (*layers, *products.nodes)}
    caches = {name for node in layers for name in (*node.past, *node.present)}
    reached: set[int] = set()
    read: set[str] = set()
    wanted = [ports.logits]
    while wanted:
        name = wanted.pop()
        if name in read:
            continue
        read.add(name)
        if name in caches:
            raise CannotRewrite("reads keys and values of the cache outside of attention")
        index = maker.get(name)
        if index is None or index in reached:
            continue
        reached.add(index)
        wanted += [n for n in ours.get(index, graph.nodes[index].inputs) if n]
    if not attention <= reached:
        raise CannotRewrite("has attention that its logits do not depend on")
    return frozenset(reached), frozenset(read)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerArrays:
    """A layer's attention and what it keeps.

    The caches are (cells, kv_heads, head_size); `cosines` and `sines` (positions, pairs) or None.
    """

    node: AttentionNode
    key_cache: NDArray[np.generic]
    value_cache: NDArray[np.generic]
    cosines: NDArray[np.float32] | None
    sines: NDArray[np.float32] | None


class AttentionBackend(ABC):
    """Attends where a graph's node says so, by the operator that `library` has for onnxruntime."""

    library: Path
    domain: str
    number: int
    """What a node's attribute `attention_backend` names it by."""

    @abstractmethod
    def operator(self, element: str) -> str:
        """Return the operator's name for rows of an element type, as numpy names it."""

    @abstractmethod
    def bind(self, layers: list[LayerArrays]) -> None:
        """Attend in every layer's arrays from the next pass on, until others are bound.

        The model keeps them as long as it lives. The same list again costs nothing.
        """

    @abstractmethod
    def begin(self, num_past: int, num_rows: int) -> None:
        """Say that the next pass has `num_rows` after `num_past` tokens."""

    @abstractmethod
    def truncate(self, num_slots: int) -> None:
        """Drop what was derived from KV slots `num_slots` and later."""

    @property
    @abstractmethod
    def has_ended(self) -> bool:
        """Whether the last pass ended in a layer's attention, as was wanted, and not in an error."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back; closing twice is allowed."""


class MatmulBackend(ABC):
    """Computes a graph's products and look-ups of packed matrices, which nodes name by their numbers.

    The operators are of the attender's library and domain; a node's attribute `products` is `number`.
    """

    matmul_operator: str
    gather_operator: str
    number: int

    @abstractmethod
    def begin(self) -> None:
        """Say that a pass begins."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back; closing twice is allowed."""


OPERATOR_VERSION = 1


class RewrittenGraph:
    """Holds the graph of `path` without its external weights; `element` is what attention's rows hold.

    With `widens` an input says how many of the last rows have logits, where the graph leaves one.
    """

    def __init__(
        self, path: Path, swap: RewritePlan, element: str, logits: str, *, widens: bool = False
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

    def serialised(
        self, attention_backend: AttentionBackend, matmul_backend: MatmulBackend | None = None
    ) -> bytes:
        """Return the model in which both compute what is theirs; of its outputs the logits are left.

        A swap with products wants a multiplier.
        """
        onnx, graph = self._onnx, self._model.graph
        ours = {
            node.index: self._attention(layer, attention_backend)
            for layer, node in enumerate(self._swap.layers)
        }
        if matmul_backend is not None:
            ours |= self._products(matmul_backend, attention_backend.domain)
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
        version = onnx.helper.make_opsetid(attention_backend.domain, OPERATOR_VERSION)
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

    def _attention(self, layer: int, attention_backend: AttentionBackend) -> Any:
        node = self._swap.layers[layer]
        inputs = [node.query, node.key, node.value, node.bias]
        while not inputs[-1]:
            inputs.pop()
        return self._onnx.helper.make_node(
            attention_backend.operator(self._element),
            inputs,
            [node.output],
            name=f"attention_{layer}",
            domain=attention_backend.domain,
            handle=attention_backend.number,
            layer=layer,
        )

    def _products(self, matmul_backend: MatmulBackend, domain: str) -> dict[int, Any]:
        """Nodes for products and look-ups, by the place of the node that each stands for."""
        names: dict[str, int] = {}
        made = {}
        for node in self._swap.products.nodes:
            kind, more = matmul_backend.gather_operator, {}
            if isinstance(node, MatmulNode):
                kind = matmul_backend.matmul_operator
                more = {"input": names.setdefault(node.rows, len(names))}
            made[node.index] = self._onnx.helper.make_node(
                kind,
                node.reads,
                [node.output],
                name=f"{kind}_{node.index}",
                domain=domain,
                handle=matmul_backend.number,
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
