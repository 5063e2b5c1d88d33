"""RewrittenOnnxModel: an ONNX decoder whose attention and KV cache are ours, inside one onnxruntime session.

Knows no budget, no policy and no kernel: `AttentionBackend` and `MatmulBackend` are handed in.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lowtide.models.errors import UnsupportedModel
from lowtide.models.onnx.config import OnnxOptions
from lowtide.models.onnx.kv_cache import SlotCache
from lowtide.models.onnx.model import OnnxModel, open_session
from lowtide.models.onnx.rewrite.attention_nodes import AttentionNode
from lowtide.models.onnx.rewrite.rewrite import (
    BEGIN,
    ROWS_AXIS,
    AttentionBackend,
    LayerArrays,
    MatmulBackend,
    RewrittenGraph,
)
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class RewrittenOnnxModel(OnnxModel):
    """The graph, with what `attention_backend` attends to kept here; `matmul_backend` has the spec's packed matrices.

    `weights_of` another one, which is closed later, it runs in that one's session with a cache of its own;
    its attender is the other's, and one of them passes at a time. Raises `UnsupportedModel` where the
    graph is left whole, or onnxruntime refuses it, with the reason.
    """

    def __init__(
        self,
        spec: OnnxSpec,
        options: OnnxOptions,
        attention_backend: AttentionBackend,
        matmul_backend: MatmulBackend | None = None,
        weights_of: RewrittenOnnxModel | None = None,
    ) -> None:
        if isinstance(spec.swap, str):
            raise UnsupportedModel(f"{spec.name} keeps its own attention, as its graph {spec.swap}")
        self._swap = spec.swap
        self._attention_backend = attention_backend
        self._matmul_backend = matmul_backend
        self._weights_of = weights_of
        self._tables: dict[str, NDArray[np.float32] | None] = {}
        self._is_widened = False
        super().__init__(spec, options)

    def _read_tokenizer(self) -> Tokenizer:
        other = self._weights_of
        return super()._read_tokenizer() if other is None else other.tokenizer

    def _opened(self, options: OnnxOptions) -> Any:
        other, spec, swap = self._weights_of, self._of_onnx, self._swap
        if other is not None:
            self._ports, self._tables = other._ports, other._tables
            self._is_widened = other._is_widened
            return other._session
        self._ports = replace(
            spec.ports,
            attention_mask=_if_read(spec.ports.attention_mask, swap.inputs),
            position_ids=_if_read(spec.ports.position_ids, swap.inputs),
        )
        widens = spec.makes_last_row and options.verify_batch > 1
        graph = RewrittenGraph(spec.path, swap, spec.kv_element, spec.ports.logits, widens=widens)
        self._is_widened = graph.is_widened
        for node in swap.layers:
            for name in (node.cosines, node.sines):
                if name not in self._tables:
                    self._tables[name] = graph.weight(name)
            self._check_positions(node)
        model = graph.serialised(self._attention_backend, self._matmul_backend)
        return open_session(spec, options, model=model, operators=self._attention_backend.library)

    def _make_cache(self, options: OnnxOptions) -> None:
        spec = self._of_onnx
        heads = spec.num_kv_heads[0], spec.key_head_dim
        self._cache = self._cells = SlotCache(
            spec.num_layers, *heads, options.context, options.kv_type
        )
        self._layers = [self._layer(i, node) for i, node in enumerate(self._swap.layers)]
        self._attention_backend.bind(self._layers)

    def _make_rows(self, options: OnnxOptions) -> None:
        import numpy as np

        other, self._begin = self._weights_of, np.full(1, -1, np.int64)
        if other is not None:  # they pass in turn
            self._token_ids, self._mask = other._token_ids, other._mask
            self._positions, self._logits = other._positions, other._logits
            return
        super()._make_rows(options)

    def _layer(self, layer: int, node: AttentionNode) -> LayerArrays:
        return LayerArrays(
            node=node,
            key_cache=self._cells.tensor(layer, 0),
            value_cache=self._cells.tensor(layer, 1),
            cosines=self._tables[node.cosines],
            sines=self._tables[node.sines],
        )

    def _check_positions(self, node: AttentionNode) -> None:
        """The kernels read as many rows of both tables as there are positions."""
        cosines, sines = self._tables[node.cosines], self._tables[node.sines]
        if cosines is None or sines is None:
            return
        if cosines.ndim != 2 or cosines.shape != sines.shape:
            raise UnsupportedModel(
                f"{self.spec.name} has cosines of {cosines.shape} and sines of {sines.shape}, tables "
                "of one shape are wanted: leave attention out, and the graph runs whole"
            )
        if len(cosines) < self.context:
            raise UnsupportedModel(
                f"{self.spec.name} turns {len(cosines)} positions, a context of {self.context} is wanted: "
                f"lower --context to {len(cosines)}"
            )

    @property
    def _makes_more_rows(self) -> bool:
        return self._is_widened or super()._makes_more_rows

    def _bind(self, num_rows: int, logits: Any) -> None:
        super()._bind(num_rows, logits)
        if self._is_widened:
            self._begin[0] = -logits.shape[ROWS_AXIS]
            self._bind_array(BEGIN, self._begin)

    def _bind_cache(self, num_past: int, num_rows: int) -> None:
        self._attention_backend.bind(self._layers)
        self._attention_backend.begin(num_past, num_rows)
        if self._matmul_backend is not None:
            self._matmul_backend.begin()

    def _appended(self) -> None:
        """The rows are in the cells already."""

    def truncate(self, num_tokens: int) -> int:
        """Drop the tokens from `num_tokens` on, in the cache and in what attention derived from it."""
        kept = super().truncate(num_tokens)
        self._attention_backend.truncate(kept)
        return kept

    @property
    def _ended_early(self) -> bool:
        return self._attention_backend.has_ended

    @property
    def _kv_type(self) -> str:
        return self._cells.kv_type

    @property
    def _attention(self) -> str:
        return "ours"

    def close(self) -> None:
        """Free the session, what attends in it, and the cache."""
        self._binding = self._session = None
        if self._weights_of is None:
            self._attention_backend.close()
            if self._matmul_backend is not None:
                self._matmul_backend.close()
        super().close()


def _if_read(name: str | None, inputs: frozenset[str]) -> str | None:
    return name if name in inputs else None
