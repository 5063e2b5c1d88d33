"""Rewrites an ONNX decoder so that lowtide's kernels compute its attention and, optionally, its matmuls.

`plan_rewrite` decides from headers which nodes are replaced and which remain; `RewrittenGraph` makes the
rewritten model for a session. The kernels are passed in as an `AttentionBackend` and a `MatmulBackend`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.models.onnx.config import OnnxConfig, onnx_library
from lowtide.models.onnx.graph import OnnxGraph
from lowtide.models.onnx.rewrite.attention_nodes import (
    DECOMPOSED,
    check_layers,
    read_attention_nodes,
)
from lowtide.models.onnx.rewrite.plan import (
    AttentionNode,
    CannotRewrite,
    MatmulNode,
    MatmulNodes,
    RewritePlan,
)
from lowtide.models.onnx.spec import GraphPorts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BRANCHES = frozenset({"If", "Loop", "Scan"})
MAX_INLINE_BYTES = 16 << 20
"""Weights inside the .onnx file are read into memory to be passed on; a graph with more is not rewritten."""
MAX_HEAD_DIM = 256


def plan_rewrite(
    graph: OnnxGraph,
    ports: GraphPorts,
    config: OnnxConfig,
    matmuls: MatmulNodes | None = None,
) -> RewritePlan:
    """Return the plan that replaces the graph's attention, and the nodes of `matmuls`.

    What remains of the graph is exactly what the logits depend on; nodes that only attention needed (masks,
    lengths, caches) go. Raises `CannotRewrite` with the reason where the graph must run as it is.
    """
    matmuls = matmuls or MatmulNodes()
    branch = next((node.kind for node in graph.nodes if node.kind in BRANCHES), None)
    if branch is not None:
        raise CannotRewrite(f"has branches ({branch})")
    inline = sum(w.num_bytes for w in graph.weights.values() if w.location is None)
    if inline > MAX_INLINE_BYTES:
        raise CannotRewrite("has its weights inside the .onnx file, not as external data")
    layers = read_attention_nodes(graph, config)
    if not layers:
        raise CannotRewrite(f"has {DECOMPOSED}")
    check_layers(layers, ports.layers)
    _check_sizes(layers)
    reached, read = _reached(graph, ports, layers, matmuls)
    matmuls = matmuls.among(reached)
    replaced = {node.index for node in (*layers, *matmuls.nodes)}
    nodes = frozenset(reached - replaced)
    read -= {graph.nodes[index].outputs[0] for index in replaced}
    return RewritePlan(
        layers=layers,
        nodes=nodes,
        weights=read & frozenset(graph.weights),
        inputs=read - frozenset(graph.weights) - {n for i in nodes for n in graph.nodes[i].outputs},
        inline_bytes=inline,
        matmuls=matmuls,
    )


def _check_sizes(layers: tuple[AttentionNode, ...]) -> None:
    for node in layers:
        whole_groups = node.num_kv_heads > 0 and node.num_heads % node.num_kv_heads == 0
        if not whole_groups or node.head_dim % 16 or node.head_dim > MAX_HEAD_DIM:
            raise CannotRewrite(
                f"has {node.num_heads} heads over {node.num_kv_heads} of size {node.head_dim}"
            )


def _reached(
    graph: OnnxGraph,
    ports: GraphPorts,
    layers: tuple[AttentionNode, ...],
    matmuls: MatmulNodes,
) -> tuple[frozenset[int], frozenset[str]]:
    """Return the nodes that the logits depend on, replaced ones included, and all values that they read."""
    maker = {name: i for i, node in enumerate(graph.nodes) for name in node.outputs if name}
    attention = {node.index for node in layers}
    replaced = {node.index: node.inputs for node in (*layers, *matmuls.nodes)}
    caches = {name for node in layers for name in (*node.past, *node.present)}
    reached: set[int] = set()
    read: set[str] = set()
    pending = [ports.logits]
    while pending:
        name = pending.pop()
        if name in read:
            continue
        read.add(name)
        if name in caches:
            raise CannotRewrite("reads keys and values of the cache outside of attention")
        index = maker.get(name)
        if index is None or index in reached:
            continue
        reached.add(index)
        pending += [n for n in replaced.get(index, graph.nodes[index].inputs) if n]
    if not attention <= reached:
        raise CannotRewrite("has an attention node that its logits do not depend on")
    return frozenset(reached), frozenset(read)


BEGIN = "lowtide_logits_begin"
"""The graph input with the first position that gets logits, from the end: -1 selects the last token."""
TOKENWISE = frozenset(
    "Add Cast Div LayerNormalization MatMul MatMulNBits Mul SimplifiedLayerNormalization Tanh".split()
)
TOKEN_AXIS = 1


class LastTokenSlice:
    """The Slice with which a graph keeps only the last token before its logits; it can be made to keep more.

    It is found only where every operator behind it works token by token, so that logits of more tokens equal
    those of each token alone.
    """

    def __init__(self, graph: Any, logits: str) -> None:
        self._onnx = onnx_library("onnx")
        self._weights = {weight.name: weight for weight in graph.initializer}
        self._maker = {name: node for node in graph.node for name in node.output if name}
        self._slice = self._find(logits)

    @property
    def is_found(self) -> bool:
        """Whether the graph has such a Slice."""
        return self._slice is not None

    def node(self, node: Any) -> Any:
        """Return the node; the Slice is replaced by one that begins where the input `BEGIN` says."""
        if node is not self._slice:
            return node
        widened = self._onnx.NodeProto()
        widened.CopyFrom(node)
        widened.input[1] = BEGIN
        return widened

    def input(self) -> Any:
        """Return the additional graph input `BEGIN`."""
        return self._onnx.helper.make_tensor_value_info(BEGIN, self._onnx.TensorProto.INT64, [1])

    def output(self, port: Any) -> Any:
        """Return the logits' output, with any number of tokens."""
        widened = self._onnx.ValueInfoProto()
        widened.CopyFrom(port)
        widened.type.tensor_type.shape.dim[TOKEN_AXIS].Clear()
        return widened

    def _find(self, logits: str) -> Any:
        """Return the Slice behind which only token-wise operators follow."""
        name = logits
        while (node := self._maker.get(name)) is not None:
            if node.op_type == "Slice":
                return node if self._keeps_last_token(node) else None
            computed = [name for name in node.input if name in self._maker]
            if node.op_type not in TOKENWISE or len(computed) != 1:
                return None
            name = computed[0]
        return None

    def _keeps_last_token(self, node: Any) -> bool:
        values = [self._value(name) for name in node.input[1:]]
        if len(values) < 3 or any(value is None or value.size != 1 for value in values):
            return False
        begin, end, axis, *step = (int(value.item()) for value in values if value is not None)
        return begin == -1 and end > 0 and axis == TOKEN_AXIS and step in ([], [1])

    def _value(self, name: str) -> NDArray[np.generic] | None:
        weight = self._weights.get(name)
        if weight is None or weight.data_location == self._onnx.TensorProto.EXTERNAL:
            return None
        value: NDArray[np.generic] = self._onnx.numpy_helper.to_array(weight)
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerArrays:
    """A layer's attention node, KV cache and rotary tables.

    The caches are (slots, kv_heads, head_dim); `cosines` and `sines` are (positions, pairs) or None.
    """

    node: AttentionNode
    key_cache: NDArray[np.generic]
    value_cache: NDArray[np.generic]
    cosines: NDArray[np.float32] | None
    sines: NDArray[np.float32] | None


class AttentionBackend(ABC):
    """Computes attention in a rewritten graph, through an operator that `library` registers with onnxruntime."""

    library: Path
    domain: str
    number: int
    """The handle that a node's attribute refers to this object by."""

    @abstractmethod
    def operator(self, element: str) -> str:
        """Return the operator's name for activations of a numpy element type."""

    @abstractmethod
    def bind(self, layers: list[LayerArrays]) -> None:
        """Use the arrays of these layers from the next pass on, until others are bound.

        The caller keeps the arrays alive. Binding the same list again costs nothing.
        """

    @abstractmethod
    def begin(self, num_past: int, num_new: int) -> None:
        """Announce a pass of `num_new` tokens after `num_past`."""

    @abstractmethod
    def truncate(self, num_slots: int) -> None:
        """Drop what was derived from KV slots `num_slots` and later."""

    @property
    @abstractmethod
    def has_ended(self) -> bool:
        """Whether the last pass ended early in a layer's attention, as requested, and not with an error."""

    @abstractmethod
    def close(self) -> None:
        """Free everything; closing twice is allowed."""


class MatmulBackend(ABC):
    """Computes a rewritten graph's matmuls and lookups from repacked matrices, which nodes refer to by number.

    The operators belong to the library and domain of the `AttentionBackend`.
    """

    matmul_operator: str
    gather_operator: str
    number: int

    @abstractmethod
    def begin(self) -> None:
        """Announce a pass."""

    @abstractmethod
    def close(self) -> None:
        """Free everything; closing twice is allowed."""


OPERATOR_VERSION = 1


class RewrittenGraph:
    """The graph of `path` without its external weights; `element` is the type of attention's activations.

    With `more_logits`, a graph that keeps the last token gets an input that selects how many tokens have
    logits.
    """

    def __init__(
        self,
        path: Path,
        plan: RewritePlan,
        element: str,
        logits: str,
        *,
        more_logits: bool = False,
    ) -> None:
        self._onnx = onnx_library("onnx")
        self._folder = path.parent
        self._plan = plan
        self._element = element
        self._model = self._onnx.load(str(path), load_external_data=False)
        self._logits = logits
        last_token = LastTokenSlice(self._model.graph, logits) if more_logits else None
        self._last_token = last_token if last_token is not None and last_token.is_found else None
        self._weights = {weight.name: weight for weight in self._model.graph.initializer}

    @property
    def has_begin_input(self) -> bool:
        """Whether the graph has the input `BEGIN`."""
        return self._last_token is not None

    def serialised(
        self, attention_backend: AttentionBackend, matmul_backend: MatmulBackend | None = None
    ) -> bytes:
        """Return the model with both backends' operators in it; its only output is the logits.

        A plan with matmuls needs a matmul backend.
        """
        onnx, graph = self._onnx, self._model.graph
        replaced = {
            node.index: self._attention(layer, attention_backend)
            for layer, node in enumerate(self._plan.layers)
        }
        if matmul_backend is not None:
            replaced |= self._matmuls(matmul_backend, attention_backend.domain)
        nodes = [
            replaced[index] if index in replaced else self._remaining(node)
            for index, node in enumerate(graph.node)
            if index in replaced or index in self._plan.nodes
        ]
        rewritten = onnx.helper.make_graph(
            nodes,
            graph.name or "decoder",
            self._inputs(),
            self._outputs(),
            [self._weights[name] for name in sorted(self._plan.weights)],
        )
        version = onnx.helper.make_opsetid(attention_backend.domain, OPERATOR_VERSION)
        model = onnx.helper.make_model(
            rewritten,
            opset_imports=[*self._model.opset_import, version],
            ir_version=self._model.ir_version,
        )
        serialised: bytes = model.SerializeToString()
        return serialised

    def _remaining(self, node: Any) -> Any:
        return node if self._last_token is None else self._last_token.node(node)

    def _inputs(self) -> list[Any]:
        kept = [port for port in self._model.graph.input if port.name in self._plan.inputs]
        return kept if self._last_token is None else [*kept, self._last_token.input()]

    def _outputs(self) -> list[Any]:
        kept = [port for port in self._model.graph.output if port.name == self._logits]
        return kept if self._last_token is None else list(map(self._last_token.output, kept))

    def _attention(self, layer: int, attention_backend: AttentionBackend) -> Any:
        node = self._plan.layers[layer]
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

    def _matmuls(self, matmul_backend: MatmulBackend, domain: str) -> dict[int, Any]:
        """Return nodes for matmuls and lookups, by the index of the node that each replaces."""
        names: dict[str, int] = {}
        nodes = {}
        for node in self._plan.matmuls.nodes:
            kind, more = matmul_backend.gather_operator, {}
            if isinstance(node, MatmulNode):
                kind = matmul_backend.matmul_operator
                more = {"input": names.setdefault(node.activations, len(names))}
            nodes[node.index] = self._onnx.helper.make_node(
                kind,
                node.inputs,
                [node.output],
                name=f"{kind}_{node.index}",
                domain=domain,
                handle=matmul_backend.number,
                matrix=node.matrix,
                **more,
            )
        return nodes

    def weight(self, name: str) -> NDArray[np.float32] | None:
        """Return a copy of a weight, float32; None for the name ""."""
        import numpy as np

        if not name:
            return None
        array = self._onnx.numpy_helper.to_array(self._weights[name], base_dir=str(self._folder))
        return np.ascontiguousarray(array, np.float32)
