"""PieceChain: the sessions of all pieces, and what they hand over to each other and to attention.

Requires a graph that can be cut. Ensures that a pass computes what the graph would: each piece reads what
earlier ones made, and the attention of layer i lies between piece i and the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lowtide.models.errors import UnsupportedModel
from lowtide.models.onnx.cut.hand_over import Passed, hand_over
from lowtide.models.onnx.cut.piece_models import PieceModels, ValueType, row_type
from lowtide.models.onnx.cut.pieces import Cut
from lowtide.models.onnx.cut.sessions import PieceSession
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.onnx.thread_pool import share_threads

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class PieceChain:
    """One session a piece. `graph_inputs` are arrays (1, max_rows) of what a pass's rows are told by.

    Raises `UnsupportedModel` where a value is not what attention needs.
    """

    def __init__(
        self, spec: OnnxSpec, cut: Cut, threads: int, graph_inputs: dict[str, NDArray[np.int64]]
    ) -> None:
        import numpy as np

        self._spec, self._cut = spec, cut
        self._graph_inputs = graph_inputs
        self._logits_name = spec.ports.logits
        self._max_rows = next(iter(graph_inputs.values())).shape[1]
        self.weights: dict[str, NDArray[np.float32]] = {}
        self._types: dict[str, ValueType] = {}
        self._sessions: list[PieceSession] = []
        share_threads(threads)
        self._open(threads)
        self.arrays = hand_over(self._passed(), self._max_rows)
        last = cut.pieces[-1]
        self._last_row_alone = all(name in self.arrays for name in last.inputs)
        num_logits = spec.vocabulary.num_tokens
        rows = 1 if self._last_row_alone or spec.makes_last_row else self._max_rows
        self._logits = np.zeros((1, rows, num_logits), spec.logits_element)
        self._made: dict[str, Any] = {}
        self._num_rows = 0
        self._bound_logits = self._logits

    def _open(self, threads: int) -> None:
        models, folder = PieceModels(self._spec.path, self._spec.ports), self._spec.path.parent
        for layer, piece in enumerate(self._cut.pieces):
            session = PieceSession(piece, models.serialised(piece, self._types), folder, threads)
            self._sessions.append(session)
            self._types.update(session.output_types())
            if layer < len(self._cut.layers):
                self._take_attention(layer)
        for node in self._cut.layers:
            for name in filter(None, (node.cosines, node.sines)):
                if name not in self.weights:
                    self.weights[name] = models.weight(name, folder)

    def _take_attention(self, layer: int) -> None:
        """Check what a layer's attention reads, and know the type of what it makes."""
        node = self._cut.layers[layer]
        packed = node.width + 2 * node.kv_width
        widths = {node.query: packed if node.is_packed else node.width}
        if not node.is_packed:
            widths |= {node.key: node.kv_width, node.value: node.kv_width}
        element = self._types[node.query].element
        for name, width in widths.items():
            found = self._types[name]
            if found.row_width != width or found.element != element:
                raise UnsupportedModel(
                    f"{self._spec.name} gives attention {name} as {found.kind} of {found.shape}, "
                    f"{width} channels a row are wanted: leave attention out, and the graph runs whole"
                )
        self._types[node.output] = row_type(element, node.width)

    def _passed(self) -> list[Passed]:
        """What is handed over by rows, and from when to when: piece i at 2i, its attention at 2i + 1."""
        made = {name: 2 * i for i, piece in enumerate(self._cut.pieces) for name in piece.outputs}
        made |= {node.output: 2 * i + 1 for i, node in enumerate(self._cut.layers)}
        read = dict(made)
        for i, piece in enumerate(self._cut.pieces):
            read.update(dict.fromkeys(piece.inputs, 2 * i))
        for i, node in enumerate(self._cut.layers):
            for name in node.reads:
                read[name] = max(read[name], 2 * i + 1)
        del made[self._logits_name]
        passed = []
        for name, moment in made.items():
            width = self._types[name].row_width
            if width is not None:
                element = self._types[name].element
                passed.append(
                    Passed(name=name, element=element, width=width, made=moment, read=read[name])
                )
        return passed

    def run(
        self,
        num_rows: int,
        attention_mask: NDArray[np.int64],
        start: Callable[[dict[str, NDArray[np.generic]]], None],
        attend: Callable[[int], None],
    ) -> NDArray[np.generic]:
        """Compute a pass and return its last row's logits, a view.

        `start` is told the biases before the first layer that `attend` is called for.
        """
        if num_rows != self._num_rows:
            self._bind_rows(num_rows)
        for index, session in enumerate(self._sessions):
            self._bind_pass(session, attention_mask)
            session.run()
            self._take_new(session)
            if index == 0:
                start(self._biases())
            if index < len(self._cut.layers):
                attend(index)
        self._made.clear()
        last: NDArray[np.generic] = self._bound_logits[0, -1]
        return last

    def _bind_rows(self, num_rows: int) -> None:
        """Bind what has a place of its own, for passes of so many rows."""
        self._num_rows = 0
        for session in self._sessions:
            rows = slice(0, num_rows)
            if session is self._sessions[-1] and self._last_row_alone:
                rows = slice(num_rows - 1, num_rows)
            for name in session.piece.inputs:
                array = self._graph_inputs.get(name, self.arrays.get(name))
                if array is not None:
                    session.bind_input(name, array[:, rows])
            for name in session.piece.outputs:
                if name in self.arrays:
                    session.bind_output(name, self.arrays[name][:, rows])
            session.new_outputs = tuple(
                n for n in session.piece.outputs if n not in self.arrays and n != self._logits_name
            )
        self._bound_logits = self._logits[:, :num_rows]
        self._sessions[-1].bind_output(self._logits_name, self._bound_logits)
        self._num_rows = num_rows

    def _bind_pass(self, session: PieceSession, attention_mask: NDArray[np.int64]) -> None:
        """Bind what is another with every pass."""
        for name in session.piece.inputs:
            if name == self._spec.ports.attention_mask:
                session.bind_input(name, attention_mask)
            elif name in self._made:
                session.bind_value(name, self._made[name])
        for name in session.new_outputs:
            session.bind_new_output(name)

    def _take_new(self, session: PieceSession) -> None:
        for name in session.new_outputs:
            self._made[name] = session.made(name)

    def _biases(self) -> dict[str, NDArray[np.generic]]:
        names = {node.bias for node in self._cut.layers if node.bias}
        return {name: self._made[name].numpy() for name in names}

    def close(self) -> None:
        """Free the sessions."""
        self._sessions.clear()
        self.arrays.clear()
