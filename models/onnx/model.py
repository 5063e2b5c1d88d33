"""An ONNX decoder as one onnxruntime session: the graph as it is, with the KV cache held here.

Knows no budget: what to allocate is decided by whoever fills `OnnxOptions`.

CachedModel: an ONNX model with its KV cache in buffers of ours. Knows no session."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.models.errors import ForwardError, ModelError, SnapshotError, UnsupportedModel
from lowtide.models.fingerprint import file_fingerprint
from lowtide.models.model import Model
from lowtide.models.onnx.config import OnnxOptions, onnx_library, session_options, session_providers
from lowtide.models.onnx.kv_cache import TokenCache, made_cache, read_cells, write_cells
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.onnx.tokenizer import OnnxTokenizer
from lowtide.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lowtide.models.model import Logits, Logits2D


class CachedModel(Model):
    """What is the same however the graph is run: going back, and the cache in a file or a copy."""

    supports_snapshot = supports_copy = True
    _num_tokens: int = 0
    _cache: TokenCache | None = None

    @property
    def num_tokens(self) -> int:
        """How many tokens are in the KV cache."""
        return self._num_tokens

    def _checked_rows(self, token_ids: Sequence[int]) -> int:
        num_rows, room = len(token_ids), self.context - self._num_tokens
        if not 0 < num_rows <= min(self.batch_size, room):
            raise ForwardError(
                f"{num_rows} rows do not go in: 1 to {self.batch_size} a pass, room for {room} tokens"
            )
        num_logits = self.spec.vocabulary.num_tokens
        outside = next((i for i in token_ids if not 0 <= i < num_logits), None)
        if outside is not None:
            raise ForwardError(f"token {outside} is not in the vocabulary of {num_logits}")
        return num_rows

    @property
    def _kv(self) -> TokenCache:
        assert self._cache is not None, "the model is closed"
        return self._cache

    def truncate(self, num_tokens: int) -> int:
        """Forget the tokens from `num_tokens` on; their pages go back to the system."""
        kept = max(min(num_tokens, self._num_tokens), 0)
        if kept < self._num_tokens:
            self._kv.cut(self._num_tokens, kept)
        self._num_tokens = kept
        return kept

    def trim(self) -> None:
        """Give back the pages that hold no token."""
        self._kv.cut(self._num_tokens, self._num_tokens)

    def save_kv(self, path: Path, token_ids: Sequence[int]) -> int:
        """Write the tokens and the cells that hold them, from where they lie."""
        assert len(token_ids) == self._num_tokens, "these are not the tokens in the cache"
        return write_cells(path, token_ids, self._kv)

    def load_kv(self, path: Path, num_bytes: int, num_tokens: int) -> list[int]:
        """Put a file's tokens and cells back; cells that hold no token stay untouched."""
        self.truncate(0)
        if not 0 <= num_tokens <= self.context:
            raise SnapshotError(
                f"it holds {num_tokens:,} tokens, there is room for {self.context:,}"
            )
        self._num_tokens = num_tokens  # what is read is given back where reading fails
        try:
            return read_cells(
                path,
                num_bytes,
                self._kv,
                num_tokens=num_tokens,
                vocabulary=self.spec.vocabulary.num_tokens,
            )
        except BaseException:
            self.truncate(0)
            raise

    def state_bytes(self) -> int:
        """Return the bytes of the cells that hold tokens."""
        return self._kv.num_bytes(self._num_tokens)

    def copy_kv(self, into: memoryview) -> None:
        """Copy the cells that hold tokens, head by head."""
        if len(into) != self.state_bytes():
            raise SnapshotError(f"{len(into)} bytes are given, {self.state_bytes()} are wanted")
        position = 0
        for row in self._kv.rows(self._num_tokens):
            into[position : position + row.nbytes] = row
            position += row.nbytes

    def put_kv(self, state: memoryview, num_tokens: int) -> None:
        """Put the cells back; those that hold no token stay untouched."""
        self.truncate(0)
        is_held = 0 <= num_tokens <= self.context
        if not is_held or self._kv.num_bytes(num_tokens) != len(state):
            raise SnapshotError(
                f"the state has {len(state)} bytes, which is not {num_tokens} tokens'"
            )
        position = 0
        for row in self._kv.rows(num_tokens):
            row[:] = state[position : position + row.nbytes]
            position += row.nbytes
        self._num_tokens = num_tokens

    def close(self) -> None:
        """Free the cache."""
        if self._cache is not None:
            self._cache.close()
            self._cache = None


_FOLDER = "session.model_external_initializers_file_folder_path"


class OnnxModel(CachedModel):
    """One session and its cache.

    Raises `UnsupportedModel` where onnxruntime refuses the graph, with its own reason.
    """

    def __init__(self, spec: OnnxSpec, options: OnnxOptions) -> None:
        self.spec = spec
        self.context = options.context
        self.batch_size = options.batch_size
        self.max_verify_batch = max(min(options.verify_batch, options.batch_size), 1)
        self._ports = spec.ports
        self._session: Any = None
        self.tokenizer = self._read_tokenizer()
        with options.stage("weights"):
            self._session = self._opened(options)
            if not self._makes_more_rows:
                self.max_verify_batch = 1
        with options.stage("context"):
            self._make_cache(options)
            self._binding = self._session.io_binding()
            self._make_rows(options)

    def _read_tokenizer(self) -> Tokenizer:
        return OnnxTokenizer(self._of_onnx)

    def _opened(self, options: OnnxOptions) -> Any:
        return open_session(self._of_onnx, options)

    def _make_cache(self, options: OnnxOptions) -> None:
        self._cache = self._bound = made_cache(self._of_onnx)(self._of_onnx, options.context)

    def _make_rows(self, options: OnnxOptions) -> None:
        """Make what goes in and out of a pass beside the cache, once."""
        import numpy as np

        self._token_ids = np.zeros((1, options.batch_size), np.int64)
        self._mask = np.ones((1, options.context), np.int64)
        self._positions = np.arange(options.context, dtype=np.int64)[None]
        num_logits = self.spec.vocabulary.num_tokens
        rows = self.max_verify_batch if self._last_row_only else options.batch_size
        # Pages of its own: rows that only a prompt's passes write take no memory before.
        element = np.dtype(self._of_onnx.logits_element)
        self._logits_pages = mmap.mmap(-1, rows * num_logits * element.itemsize)
        self._logits = np.frombuffer(self._logits_pages, element).reshape(1, rows, num_logits)

    @property
    def _last_row_only(self) -> bool:
        return self._of_onnx.makes_last_row

    @property
    def _makes_more_rows(self) -> bool:
        """Whether a pass can have the logits of several rows."""
        return not self._last_row_only

    @property
    def _of_onnx(self) -> OnnxSpec:
        assert isinstance(self.spec, OnnxSpec), "it is made with one"
        return self.spec

    def forward(self, token_ids: Sequence[int]) -> Logits:
        """Append the tokens in one run of the session and return the last row's logits."""
        last: Logits = self._computed(token_ids, 1)[-1]
        return last

    def forward_rows(self, token_ids: Sequence[int]) -> Logits2D:
        """Append the tokens in one run of the session and return every row's logits."""
        if len(token_ids) > self.max_verify_batch:
            raise ForwardError(
                f"logits of {len(token_ids)} rows are wanted, {self.max_verify_batch} are planned"
            )
        return self._computed(token_ids, len(token_ids))

    def _computed(self, token_ids: Sequence[int], num_logits: int) -> Logits2D:
        """Append the tokens and return the logits of the last `num_logits` rows."""
        import numpy as np

        num_rows = self._checked_rows(token_ids)
        self._token_ids[0, :num_rows] = token_ids
        logits = self._logits[:, : num_logits if self._last_row_only else num_rows]
        self._bind(num_rows, logits)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime has no class of its own for it
            if not self._ended_early:
                raise ForwardError(
                    f"a forward pass over {num_rows} rows at {self._num_tokens} failed: {error}"
                ) from None
        self._appended()
        self._num_tokens += num_rows
        rows: Logits2D = logits[0, -num_logits:]
        return rows if rows.dtype == np.float32 else rows.astype(np.float32)

    def _bind(self, num_rows: int, logits: Any) -> None:
        start, end = self._num_tokens, self._num_tokens + num_rows
        ports, binding = self._ports, self._binding
        self._bind_array(ports.token_ids, self._token_ids[:, :num_rows])
        if ports.attention_mask is not None:
            self._bind_array(ports.attention_mask, self._mask[:, :end])
        if ports.position_ids is not None:
            self._bind_array(ports.position_ids, self._positions[:, start:end])
        self._bind_cache(start, num_rows)
        address = logits.ctypes.data
        binding.bind_output(ports.logits, "cpu", 0, logits.dtype, list(logits.shape), address)

    def _bind_cache(self, num_past: int, num_rows: int) -> None:
        self._bound.bind(self._binding, num_past, num_rows)

    def _appended(self) -> None:
        self._bound.appended()

    @property
    def _ended_early(self) -> bool:
        """Whether the last pass was to end before its last layer."""
        return False

    def _bind_array(self, name: str, values: Any) -> None:
        """Bind an input to an array of one row, which is contiguous wherever it is cut."""
        address = values.ctypes.data
        self._binding.bind_input(name, "cpu", 0, values.dtype, list(values.shape), address)

    def snapshot_component(self) -> dict[str, str]:
        """Return the weights, how the cells are kept and by whom, and the onnxruntime they came from."""
        spec = self._of_onnx
        return {
            "model": f"{spec.name}, {spec.quantisation}, {file_fingerprint(spec.paths)}",
            "KV type": self._kv_type,
            "attention": self._attention,
            "onnxruntime": str(onnx_library("onnxruntime").__version__),
        }

    @property
    def _kv_type(self) -> str:
        return self._of_onnx.kv_types[0]

    @property
    def _attention(self) -> str:
        return self._of_onnx.attention

    def close(self) -> None:
        """Free the session and the cache."""
        self._binding = self._session = None
        super().close()


def open_session(
    spec: OnnxSpec,
    options: OnnxOptions,
    *,
    model: bytes | None = None,
    operators: Path | None = None,
) -> Any:
    """Return a session of the spec's graph, or of `model` over its weights; `operators` is a library.

    Raises `UnsupportedModel` where onnxruntime refuses it, `ModelError` where there is no memory.
    """
    library = onnx_library("onnxruntime")
    given = session_options(options.threads)
    if model is not None:
        given.add_session_config_entry(_FOLDER, str(spec.path.parent))
    try:
        if operators is not None:
            given.register_custom_ops_library(str(operators))
        return library.InferenceSession(
            str(spec.path) if model is None else model,
            given,
            providers=session_providers(options.provider),
        )
    except MemoryError:
        raise ModelError(f"{spec.path} cannot be loaded: the system has no memory for it") from None
    except Exception as error:  # onnxruntime has no class of its own for it
        raise UnsupportedModel(
            f"onnxruntime {library.__version__} cannot run {spec.path}: {error}"
        ) from None
