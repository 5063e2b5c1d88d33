"""OnnxModel: an ONNX decoder as one onnxruntime session, with its KV cache in buffers of this process.

`CachedModel` has what does not depend on how the graph is run: truncation, and the KV cache in a file or a
copy. What to allocate is decided by whoever fills `OnnxOptions`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.models.background import BackgroundThread
from lowtide.models.errors import ForwardError, ModelError, SnapshotError, UnsupportedModel
from lowtide.models.files.fingerprint import file_fingerprint
from lowtide.models.logits import ADVICE, NOT_NUMBERS, are_numbers
from lowtide.models.model import Model
from lowtide.models.onnx.config import OnnxOptions, onnx_library, session_options, session_providers
from lowtide.models.onnx.kv_cache import (
    CopiedCache,
    SharedCache,
    TokenCache,
    read_cache,
    write_cache,
)
from lowtide.models.onnx.spec import ELEMENT_BYTES, OnnxSpec
from lowtide.models.onnx.tokenizer import OnnxTokenizer
from lowtide.models.page_buffer import PageBuffer
from lowtide.models.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lowtide.models.model import Logits, Logits2D

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""onnxruntime's session entry for where a model from memory has its weights."""


class CachedModel(Model):
    """The KV cache of an ONNX model: truncation, snapshots in a file and in memory."""

    supports_snapshot = supports_copy = True
    _num_tokens: int = 0
    _cache: TokenCache | None = None

    @property
    def num_tokens(self) -> int:
        """How many tokens are in the KV cache."""
        return self._num_tokens

    def _check_tokens(self, token_ids: Sequence[int]) -> None:
        room = self.context - self._num_tokens
        if not 0 < len(token_ids) <= min(self.batch_size, room):
            raise ForwardError(
                f"a pass has {len(token_ids)} tokens; it must have 1 to {self.batch_size}, and the context "
                f"has room for {room}"
            )
        num_logits = self.spec.vocabulary.num_tokens
        outside = next((i for i in token_ids if not 0 <= i < num_logits), None)
        if outside is not None:
            raise ForwardError(f"token {outside} is not in the vocabulary of {num_logits}")

    @property
    def _kv(self) -> TokenCache:
        assert self._cache is not None, "the model is closed"
        return self._cache

    def truncate(self, num_tokens: int) -> int:
        """Drop the tokens from `num_tokens` on and return their pages to the system."""
        remaining = max(min(num_tokens, self._num_tokens), 0)
        if remaining < self._num_tokens:
            self._kv.truncate(self._num_tokens, remaining)
        self._num_tokens = remaining
        return remaining

    def release_pages(self) -> None:
        """Return the pages of the KV cache that hold no token to the system."""
        self._kv.release_pages(self._num_tokens)

    def save_kv(self, path: Path, token_ids: Sequence[int]) -> int:
        """Write the tokens with their keys and values, straight from the cache."""
        assert len(token_ids) == self._num_tokens, "these are not the tokens in the cache"
        return write_cache(path, token_ids, self._kv)

    def load_kv(self, path: Path, num_bytes: int, num_tokens: int) -> list[int]:
        """Read the tokens, keys and values of a file; slots without a token stay untouched."""
        self.truncate(0)
        if not 0 <= num_tokens <= self.context:
            raise SnapshotError(
                f"it holds {num_tokens:,} tokens, more than the context of {self.context:,}"
            )
        self._num_tokens = num_tokens  # so that `truncate` below releases what was read
        try:
            return read_cache(
                path,
                num_bytes,
                self._kv,
                num_tokens=num_tokens,
                vocabulary=self.spec.vocabulary.num_tokens,
            )
        except BaseException:
            self.truncate(0)
            raise

    def snapshot_bytes(self) -> int:
        """Return the bytes of the slots that hold tokens."""
        return self._kv.num_bytes(self._num_tokens)

    def copy_kv(self, into: memoryview) -> None:
        """Copy the slots that hold tokens, block by block."""
        if len(into) != self.snapshot_bytes():
            raise SnapshotError(
                f"the buffer has {len(into)} bytes; the copy takes {self.snapshot_bytes()}"
            )
        position = 0
        for block in self._kv.blocks(self._num_tokens):
            into[position : position + block.nbytes] = block
            position += block.nbytes

    def put_kv(self, snapshot: memoryview, num_tokens: int) -> None:
        """Put the slots back; those without a token stay untouched."""
        self.truncate(0)
        fits = 0 <= num_tokens <= self.context
        if not fits or self._kv.num_bytes(num_tokens) != len(snapshot):
            raise SnapshotError(
                f"the snapshot has {len(snapshot)} bytes, which is not the size of {num_tokens} tokens"
            )
        position = 0
        for block in self._kv.blocks(num_tokens):
            block[:] = snapshot[position : position + block.nbytes]
            position += block.nbytes
        self._num_tokens = num_tokens

    def close(self) -> None:
        """Free the KV cache."""
        if self._cache is not None:
            self._cache.close()
            self._cache = None


class OnnxModel(CachedModel):
    """One session and its KV cache.

    Raises `UnsupportedModel` where onnxruntime refuses the graph, with its own reason.
    """

    def __init__(self, spec: OnnxSpec, options: OnnxOptions) -> None:
        self.spec = spec
        self.context = options.context
        self.batch_size = options.batch_size
        self.max_verify_batch = max(min(options.verify_batch, options.batch_size), 1)
        self._ports = spec.ports
        self._session: Any = None
        self._thread = BackgroundThread() if options.background else None
        self.tokenizer = self._read_tokenizer()
        with options.stage("weights"):
            self._session = self._compute_by(self._open_session, options)
            if self._last_logits_only and not self._can_select_logits:
                self.max_verify_batch = 1
        with options.stage("context"):
            self._make_cache(options)
            self._binding = self._session.io_binding()
            self._make_buffers(options)

    def _compute_by(self, function: Callable[..., Any], *arguments: object) -> Any:
        """Call the function where passes compute; threads that it starts have the same priority."""
        if self._thread is None:
            return function(*arguments)
        return self._thread.run(function, *arguments)

    def _read_tokenizer(self) -> Tokenizer:
        return OnnxTokenizer(self._onnx_spec)

    def _open_session(self, options: OnnxOptions) -> Any:
        return open_session(self._onnx_spec, options)

    def _make_cache(self, options: OnnxOptions) -> None:
        spec = self._onnx_spec
        kind = SharedCache if spec.shares_cache else CopiedCache
        self._cache = self._graph_cache = kind(spec, options.context)

    def _make_buffers(self, options: OnnxOptions) -> None:
        """Allocate the inputs and outputs of a pass beside the cache, once."""
        import numpy as np

        self._token_ids = np.zeros((1, options.batch_size), np.int64)
        self._mask = np.ones((1, options.context), np.int64)
        self._positions = np.arange(options.context, dtype=np.int64)[None]
        num_logits = self.spec.vocabulary.num_tokens
        num_tokens = self.max_verify_batch if self._last_logits_only else options.batch_size
        element = self._onnx_spec.logits_element
        # In pages of its own: logits that only a prompt's passes write take no memory before.
        pages = PageBuffer(num_tokens * num_logits * ELEMENT_BYTES[element])
        self._logits = np.frombuffer(pages.view, np.dtype(element)).reshape(
            1, num_tokens, num_logits
        )

    @property
    def _last_logits_only(self) -> bool:
        """Whether the graph, as it is in its file, has logits of a pass's last token alone."""
        return self._onnx_spec.last_logits_only

    @property
    def _can_select_logits(self) -> bool:
        """Whether the session's graph takes the number of tokens that get logits."""
        return False

    @property
    def _onnx_spec(self) -> OnnxSpec:
        assert isinstance(self.spec, OnnxSpec), "the constructor takes one"
        return self.spec

    def forward(self, token_ids: Sequence[int]) -> Logits:
        """Append the tokens in one run of the session and return the last token's logits."""
        last: Logits = self._compute(token_ids, 1)[-1]
        return last

    def forward_rows(self, token_ids: Sequence[int]) -> Logits2D:
        """Append the tokens in one run of the session and return every token's logits."""
        if len(token_ids) > self.max_verify_batch:
            raise ForwardError(
                f"logits of {len(token_ids)} tokens were requested; the plan allows {self.max_verify_batch}"
            )
        return self._compute(token_ids, len(token_ids))

    def _compute(self, token_ids: Sequence[int], num_logits: int) -> Logits2D:
        """Append the tokens and return the logits of the last `num_logits` of them."""
        import numpy as np

        self._check_tokens(token_ids)
        num_new = len(token_ids)
        self._token_ids[0, :num_new] = token_ids
        logits = self._logits[:, : num_logits if self._last_logits_only else num_new]
        self._bind(num_new, logits)
        try:
            self._compute_by(self._session.run_with_iobinding, self._binding)
        except Exception as error:  # onnxruntime has no exception class of its own
            if not self._ended_early:
                raise ForwardError(
                    f"a forward pass of {num_new} tokens at {self._num_tokens} failed: {error}"
                ) from None
        found: Logits2D = logits[0, -num_logits:]
        if not self._ended_early and not are_numbers(found):
            raise ForwardError(
                f"{self.spec.path}: {NOT_NUMBERS} (first {self._first_not_number(num_new)}); {ADVICE}"
            )
        self._commit()
        self._num_tokens += num_new
        return found if found.dtype == np.float32 else found.astype(np.float32)

    def _first_not_number(self, num_new: int) -> str:
        """Return where a pass of `num_new` tokens, which is not committed, has values that are no numbers."""
        layer = self._kv.layer_without_numbers(self._num_tokens, num_new)
        if layer is not None:
            return f"in the keys or values of layer {layer}"
        last = self.spec.num_layers - 1
        return f"behind the keys and values of layer {last}, at the output {self._ports.logits!r}"

    def _bind(self, num_new: int, logits: Any) -> None:
        start, end = self._num_tokens, self._num_tokens + num_new
        ports, binding = self._ports, self._binding
        self._bind_array(ports.token_ids, self._token_ids[:, :num_new])
        if ports.attention_mask is not None:
            self._bind_array(ports.attention_mask, self._mask[:, :end])
        if ports.position_ids is not None:
            self._bind_array(ports.position_ids, self._positions[:, start:end])
        self._bind_cache(start, num_new)
        address = logits.ctypes.data
        binding.bind_output(ports.logits, "cpu", 0, logits.dtype, list(logits.shape), address)

    def _bind_cache(self, num_past: int, num_new: int) -> None:
        self._graph_cache.bind(self._binding, num_past, num_new)

    def _commit(self) -> None:
        self._graph_cache.commit()

    @property
    def _ended_early(self) -> bool:
        """Whether the last pass ended before its last layer, as requested."""
        return False

    def _bind_array(self, name: str, values: Any) -> None:
        """Bind an input to an array of shape (1, n), which is contiguous whatever n is."""
        address = values.ctypes.data
        self._binding.bind_input(name, "cpu", 0, values.dtype, list(values.shape), address)

    def snapshot_properties(self) -> dict[str, str]:
        """Return the weights, the KV type, who computes attention, and the version of onnxruntime."""
        spec = self._onnx_spec
        return {
            "model": f"{spec.name}, {spec.quantisation}, {file_fingerprint(spec.paths)}",
            "KV type": self._kv_type,
            "attention": self._attention,
            "onnxruntime": str(onnx_library("onnxruntime").__version__),
        }

    @property
    def _kv_type(self) -> str:
        return self._onnx_spec.kv_types[0]

    @property
    def _attention(self) -> str:
        return self._onnx_spec.attention

    def close(self) -> None:
        """Free the session and the KV cache."""
        self._binding = self._session = None
        if self._thread is not None:
            self._thread.close()
        super().close()


def open_session(
    spec: OnnxSpec,
    options: OnnxOptions,
    *,
    model: bytes | None = None,
    operators: Path | None = None,
) -> Any:
    """Return a session of the spec's graph, or of the graph `model` with the spec's weights.

    `operators` is a library of custom operators. Raises `UnsupportedModel` where onnxruntime refuses the
    graph, `ModelError` where there is no memory.
    """
    library = onnx_library("onnxruntime")
    settings = session_options(options.threads)
    if model is not None:
        settings.add_session_config_entry(WEIGHTS_FOLDER, str(spec.path.parent))
    try:
        if operators is not None:
            settings.register_custom_ops_library(str(operators))
        return library.InferenceSession(
            str(spec.path) if model is None else model,
            settings,
            providers=session_providers(options.provider),
        )
    except MemoryError:
        raise ModelError(f"{spec.path} cannot be loaded: the system is out of memory") from None
    except Exception as error:  # onnxruntime has no exception class of its own
        raise UnsupportedModel(
            f"onnxruntime {library.__version__} cannot run {spec.path}: {error}"
        ) from None
