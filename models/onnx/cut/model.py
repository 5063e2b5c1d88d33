"""CutModel: an ONNX decoder as pieces in onnxruntime, with attention and the KV cache outside of them.

Knows no budget and no policy: `Attender` is handed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowtide.models.errors import ForwardError, UnsupportedModel
from lowtide.models.onnx.cached_model import CachedModel
from lowtide.models.onnx.cut.attender import Attender, LayerArrays
from lowtide.models.onnx.cut.attention_node import AttentionNode
from lowtide.models.onnx.cut.chain import PieceChain
from lowtide.models.onnx.cut.piece_cache import PieceCache
from lowtide.models.onnx.options import OnnxOptions
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.onnx.tokenizer import OnnxTokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lowtide.models.model import Logits


class CutModel(CachedModel):
    """The pieces of one graph and their cache; `attender` runs between them.

    Raises `UnsupportedModel` where the graph is not cut, or onnxruntime refuses a piece, with the reason.
    """

    def __init__(self, spec: OnnxSpec, options: OnnxOptions, attender: Attender) -> None:
        import numpy as np

        if isinstance(spec.cut, str):
            raise UnsupportedModel(f"{spec.name} runs whole, as its graph {spec.cut}")
        self.spec = spec
        self.context, self.max_rows = options.context, options.max_rows
        self.tokenizer = OnnxTokenizer(spec)
        self._attender = attender
        self._token_ids = np.zeros((1, options.max_rows), np.int64)
        self._positions = np.zeros((1, options.max_rows), np.int64)
        self._mask = np.ones((1, options.context), np.int64)
        inputs = {spec.ports.token_ids: self._token_ids}
        if spec.ports.position_ids is not None:
            inputs[spec.ports.position_ids] = self._positions
        with options.stage("weights"):
            self._chain = PieceChain(spec, spec.cut, options.threads, inputs)
        with options.stage("context"):
            heads = spec.num_kv_heads[0], spec.key_head_size
            self._cache = self._tensors = PieceCache(
                spec.num_layers, *heads, options.context, options.kv_type
            )
            attender.bind([self._layer(i, node) for i, node in enumerate(spec.cut.layers)])
        for node in spec.cut.layers:
            self._check_positions(node)

    def _layer(self, layer: int, node: AttentionNode) -> LayerArrays:
        arrays, weights = self._chain.arrays, self._chain.weights
        if node.is_packed:
            ends = (node.width, node.width + node.kv_width)
            packed = arrays[node.query][0]
            rows = packed[:, : ends[0]], packed[:, ends[0] : ends[1]], packed[:, ends[1] :]
        else:
            rows = arrays[node.query][0], arrays[node.key][0], arrays[node.value][0]
        return LayerArrays(
            node=node,
            query=rows[0],
            key=rows[1],
            value=rows[2],
            out=arrays[node.output][0],
            key_cache=self._tensors.tensor(layer, 0),
            value_cache=self._tensors.tensor(layer, 1),
            cosines=weights.get(node.cosines),
            sines=weights.get(node.sines),
        )

    def _check_positions(self, node: AttentionNode) -> None:
        """The kernels read as many rows of both tables as there are positions."""
        cosines, sines = (self._chain.weights.get(name) for name in (node.cosines, node.sines))
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

    def forward(self, token_ids: Sequence[int]) -> Logits:
        """Append the tokens, piece by piece, and return the last row's logits."""
        import numpy as np

        num_rows, num_past = self._checked_rows(token_ids), self._num_tokens
        end = num_past + num_rows
        self._token_ids[0, :num_rows] = token_ids
        self._positions[0, :num_rows] = np.arange(num_past, end)

        def start(biases: dict[str, NDArray[np.generic]]) -> None:
            self._attender.start(num_past, num_rows, biases)

        try:
            logits = self._chain.run(num_rows, self._mask[:, :end], start, self._attender.attend)
        except ForwardError:
            raise
        except Exception as error:  # onnxruntime has no class of its own for it
            raise ForwardError(
                f"a forward pass over {num_rows} rows at {num_past} failed: {error}"
            ) from None
        self._num_tokens = end
        return logits.astype(np.float32, copy=False)

    def close(self) -> None:
        """Free the sessions, what attends between them, and the cache."""
        self._chain.close()
        self._attender.close()
        super().close()
