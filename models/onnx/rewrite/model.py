"""RewrittenOnnxModel: an ONNX decoder in one onnxruntime session, with lowtide's attention and KV cache.

The kernels are passed in as an `AttentionBackend` and, for repacked weights, a `MatmulBackend`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lowtide.models.arguments.names import option
from lowtide.models.errors import UnsupportedModel
from lowtide.models.model import PassThreads
from lowtide.models.onnx.config import OnnxOptions
from lowtide.models.onnx.kv_cache import SlotCache
from lowtide.models.onnx.model import OnnxModel, open_session
from lowtide.models.onnx.rewrite.plan import AttentionNode
from lowtide.models.onnx.rewrite.rewrite import (
    BEGIN,
    TOKEN_AXIS,
    AttentionBackend,
    LayerArrays,
    MatmulBackend,
    RewrittenGraph,
)
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class RewrittenOnnxModel(OnnxModel):
    """The rewritten graph with its KV cache; `matmul_backend` computes from the spec's repacked weights.

    With `weights_of` it shares that model's session and attention backend and has only a KV cache of its own;
    the other model is closed later, and only one of them runs a pass at a time. Raises `UnsupportedModel` with
    the reason where the graph cannot be rewritten or onnxruntime refuses it.
    """

    def __init__(
        self,
        spec: OnnxSpec,
        options: OnnxOptions,
        attention_backend: AttentionBackend,
        matmul_backend: MatmulBackend | None = None,
        weights_of: RewrittenOnnxModel | None = None,
    ) -> None:
        if isinstance(spec.rewrite, str):
            raise UnsupportedModel(
                f"{spec.name} must run with its own attention, because its graph {spec.rewrite}"
            )
        self._plan = spec.rewrite
        self._attention_backend = attention_backend
        self._matmul_backend = matmul_backend
        self._weights_of = weights_of
        self._tables: dict[str, NDArray[np.float32] | None] = {}
        self._has_begin_input = False
        self._threads: PassThreads | None = None
        super().__init__(spec, options)

    def _read_tokenizer(self) -> Tokenizer:
        other = self._weights_of
        return super()._read_tokenizer() if other is None else other.tokenizer

    def _open_session(self, options: OnnxOptions) -> Any:
        other, spec, plan = self._weights_of, self._onnx_spec, self._plan
        if other is not None:
            self._ports, self._tables = other._ports, other._tables
            self._has_begin_input = other._has_begin_input
            return other._session
        self._ports = replace(
            spec.ports,
            attention_mask=_if_read(spec.ports.attention_mask, plan.inputs),
            position_ids=_if_read(spec.ports.position_ids, plan.inputs),
        )
        graph = RewrittenGraph(
            spec.path,
            plan,
            spec.kv_element,
            spec.ports.logits,
            more_logits=spec.last_logits_only and options.verify_batch > 1,
        )
        self._has_begin_input = graph.has_begin_input
        for node in plan.layers:
            for name in (node.cosines, node.sines):
                if name not in self._tables:
                    self._tables[name] = graph.weight(name)
            self._check_positions(node)
        model = graph.serialised(self._attention_backend, self._matmul_backend)
        return open_session(spec, options, model=model, operators=self._attention_backend.library)

    def _make_cache(self, options: OnnxOptions) -> None:
        spec = self._onnx_spec
        heads = spec.num_kv_heads[0], spec.key_head_dim
        self._cache = self._slots = SlotCache(
            spec.num_layers, *heads, options.context, options.kv_type
        )
        self._layers = [self._layer(i, node) for i, node in enumerate(self._plan.layers)]
        self._attention_backend.bind(self._layers)

    def _make_buffers(self, options: OnnxOptions) -> None:
        import numpy as np

        other, self._begin = self._weights_of, np.full(1, -1, np.int64)
        if other is not None:  # only one of them runs a pass at a time
            self._token_ids, self._mask = other._token_ids, other._mask
            self._positions, self._logits = other._positions, other._logits
            return
        super()._make_buffers(options)

    def _layer(self, layer: int, node: AttentionNode) -> LayerArrays:
        return LayerArrays(
            node=node,
            key_cache=self._slots.tensor(layer, 0),
            value_cache=self._slots.tensor(layer, 1),
            cosines=self._tables[node.cosines],
            sines=self._tables[node.sines],
        )

    def _check_positions(self, node: AttentionNode) -> None:
        """Check that the rotary tables cover every position of the context: the kernels do not."""
        cosines, sines = self._tables[node.cosines], self._tables[node.sines]
        if cosines is None or sines is None:
            return
        if cosines.ndim != 2 or cosines.shape != sines.shape:
            raise UnsupportedModel(
                f"{self.spec.name} has cosines of {cosines.shape} and sines of {sines.shape}; both must have "
                f"the same shape: leave {option('attention')} out to run the graph with its own attention"
            )
        if len(cosines) < self.context:
            raise UnsupportedModel(
                f"{self.spec.name} has rotary tables for {len(cosines)} positions, the context is "
                f"{self.context}: lower {option('context')} to {len(cosines)}"
            )

    @property
    def _can_select_logits(self) -> bool:
        return self._has_begin_input

    def _bind(self, num_new: int, logits: Any) -> None:
        super()._bind(num_new, logits)
        if self._has_begin_input:
            self._begin[0] = -logits.shape[TOKEN_AXIS]
            self._bind_array(BEGIN, self._begin)

    def attach_threads(self, threads: PassThreads) -> None:
        """Let `threads` choose the threads of each pass from now on."""
        self._threads = threads

    def _bind_cache(self, num_past: int, num_new: int) -> None:
        if self._threads is not None:
            self._threads.begin_pass(num_new, num_past)
        self._attention_backend.bind(self._layers)
        self._attention_backend.begin(num_past, num_new)
        if self._matmul_backend is not None:
            self._matmul_backend.begin()

    def _commit(self) -> None:
        """Do nothing: the kernels have written the new keys and values into the cache."""

    def truncate(self, num_tokens: int) -> int:
        """Drop the tokens from `num_tokens` on, their pages, and what the kernels derived from them."""
        remaining = super().truncate(num_tokens)
        self._attention_backend.truncate(remaining)
        return remaining

    @property
    def _ended_early(self) -> bool:
        return self._attention_backend.has_ended

    @property
    def _kv_type(self) -> str:
        return self._slots.kv_type

    @property
    def _attention(self) -> str:
        return "lowtide"

    def close(self) -> None:
        """Free the session, its kernels, and the KV cache."""
        self._binding = self._session = None
        if self._threads is not None:
            self._threads.close()
            self._threads = None
        if self._weights_of is None:
            self._attention_backend.close()
            if self._matmul_backend is not None:
                self._matmul_backend.close()
        super().close()


def _if_read(name: str | None, inputs: frozenset[str]) -> str | None:
    return name if name in inputs else None
