"""A GGUF model over llama.cpp's low-level C API: weights, one context, one sequence.

Knows no budget: what to allocate is decided by whoever fills `LoadOptions`.

RowBatch: the rows of one llama.cpp pass over one sequence.

What to ask of llama.cpp when a GGUF model is loaded, or only laid out. Allocates nothing."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.models.errors import ForwardError, ModelError, UnsupportedModel
from lowtide.models.fingerprint import file_fingerprint
from lowtide.models.gguf.gpu import cpu_buffer_type, device_address
from lowtide.models.gguf.llama_cpp import LlamaLibrary, llama_library
from lowtide.models.gguf.sequences import GgufSequences
from lowtide.models.gguf.spec import ATTENTION_OUTPUT
from lowtide.models.gguf.state import (
    copy_kv,
    put_kv,
    read_state,
    require_tokens,
    state_bytes,
    write_state,
)
from lowtide.models.gguf.tokenizer import GgufTokenizer
from lowtide.models.model import Model, SequenceBatch
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    from lowtide.models.model import Logits, Logits2D


class RowBatch:
    """llama.cpp's batch, allocated once for passes of up to `batch_size` rows."""

    def __init__(self, api: Any, batch_size: int) -> None:
        self._api = api
        self.struct = api.llama_batch_init(batch_size, 0, 1)
        for row in range(batch_size):
            self.struct.n_seq_id[row] = 1
            self.struct.seq_id[row][0] = 0

    def fill(self, token_ids: Sequence[int], position: int, *, every_row: bool) -> None:
        """Put the tokens in, at consecutive positions; logits are asked of every row or of the last."""
        num_rows = len(token_ids)
        struct = self.struct
        struct.n_tokens = num_rows
        for row, token_id in enumerate(token_ids):
            struct.token[row] = token_id
            struct.pos[row] = position + row
            struct.logits[row] = every_row or row == num_rows - 1

    def free(self) -> None:
        """Give its memory back."""
        self._api.llama_batch_free(self.struct)


KV_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}
"""Names of KV cache types and ggml's numbers for them."""

LOAD_COPY = 0
LOAD_MEMORY_MAP = 1
FLASH_ATTENTION_ON = 1
NOTHING = "^$"
"""A pattern that no tensor's name has."""


@dataclass(frozen=True, slots=True)
class DeviceLayers:
    """How many layers a device gets, by the name that ggml has for it."""

    device: str
    num_layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What to allocate. `context` and `batch_size` count tokens; `repack` lets llama.cpp copy weights into
    a layout of its own; `eval_callback` is llama.cpp's evaluation callback (a C function pointer's address
    and its user data), for attention of our own; `stage` is entered around "weights" and "context" as they
    are made. `gpu_layers` go to devices, the output's matrix as the last of them; with `gpu_attention`
    their KV cache and attention go there too. `verify_batch` is how many rows of a pass may have logits,
    `sequences` how many sequences share the cache's cells.
    """

    context: int
    batch_size: int
    threads: int
    kv_type: str = "f16"
    memory_map: bool = True
    repack: bool = True
    eval_callback: tuple[int, int] | None = None
    stage: Callable[[str], AbstractContextManager[object]] = nullcontext
    gpu_layers: tuple[DeviceLayers, ...] = ()
    gpu_attention: bool = True
    verify_batch: int = 1
    sequences: int = 1


class _Override(ctypes.Structure):
    """llama_model_tensor_buft_override: where tensors go whose names a pattern is found in."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


def model_parameters(
    api: Any,
    *,
    memory_map: bool,
    repack: bool,
    gpu_layers: tuple[DeviceLayers, ...] = (),
    gpu_attention: bool = True,
) -> Any:
    """Return llama.cpp's parameters for the weights; they point into memory that lives as long as they."""
    params = api.llama_model_default_params()
    # A list of its own, be it empty: llama.cpp would start every device, used or not.
    devices = (ctypes.c_void_p * (len(gpu_layers) + 1))(
        *(device_address(layers.device) for layers in gpu_layers), None
    )
    params.devices = ctypes.addressof(devices)
    params.n_gpu_layers = sum(layers.num_layers for layers in gpu_layers)
    params.kept_alive = [devices]
    if gpu_layers:
        shares = (ctypes.c_float * api.llama_max_devices())(*(g.num_layers for g in gpu_layers))
        params.tensor_split = shares
        params.kept_alive.append(shares)
        # With flash attention `offload_kqv` moves the cache alone; attention is computed where the matrix
        # that follows it lies. Any override keeps llama.cpp from holding inputs of several passes at once.
        stays = NOTHING if gpu_attention else ATTENTION_OUTPUT.replace(".", r"\.")
        overrides = (_Override * 2)(_Override(stays.encode(), cpu_buffer_type()))
        params.tensor_buft_overrides = ctypes.addressof(overrides)
        params.kept_alive.append(overrides)
    params.load_mode = LOAD_MEMORY_MAP if memory_map else LOAD_COPY
    params.use_extra_bufts = repack
    return params


def context_parameters(api: Any, options: LoadOptions) -> Any:
    """Return llama.cpp's parameters for a context that computes few rows of logits."""
    params = api.llama_context_default_params()
    params.n_ctx = options.context
    params.n_batch = params.n_ubatch = options.batch_size
    params.n_seq_max = options.sequences
    params.kv_unified = options.sequences > 1  # what sequences share lies there once
    params.n_outputs_max = options.verify_batch
    params.n_threads = params.n_threads_batch = options.threads
    params.flash_attn_type = FLASH_ATTENTION_ON
    params.type_k = params.type_v = KV_TYPES[options.kv_type]
    params.swa_full = True  # rewinding a sliding window is exact only where its past is kept
    params.no_perf = True
    params.offload_kqv = options.gpu_attention
    params.op_offload = (
        False  # it would copy weights to a device for every prompt, in bytes unplanned
    )
    if options.eval_callback is not None:
        address, user_data = options.eval_callback
        params.cb_eval = api.ggml_backend_sched_eval_callback(address)
        params.cb_eval_user_data = user_data
    return params


DECODE_ERRORS = {
    1: "the KV cache has no room for the rows",
    2: "it was aborted",
    -1: "the rows are not valid",
}


class GgufModel(Model):
    """One llama.cpp model and context; `weights_of` another one, which is closed later, it takes those.

    Raises `UnsupportedModel` where llama.cpp refuses the file or the context, with its own reason.
    """

    supports_snapshot = supports_copy = True

    def __init__(
        self, spec: ModelSpec, options: LoadOptions, weights_of: GgufModel | None = None
    ) -> None:
        self.spec = spec
        self.batch_size = options.batch_size
        self.max_verify_batch = min(options.verify_batch, options.batch_size)
        self._options = options
        self.supports_batch = not spec.recurrent_state_bytes and not options.gpu_layers
        self.on_cut: Callable[[int, int], None] | None = None
        """Told, after tokens were forgotten, how many there had been and how many are kept."""
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None
        self._library = llama_library()
        self._api = self._library.api
        self._owns_weights = weights_of is None
        try:
            if weights_of is not None:
                self._model, self.tokenizer = weights_of._model, weights_of.tokenizer
            else:
                with options.stage("weights"):
                    self._model = _load_weights(self._library, spec, options)
                self.tokenizer = GgufTokenizer(
                    self._library, self._api.llama_model_get_vocab(self._model)
                )
            with options.stage("context"):
                self._context = self._create_context(options)
            self._memory = self._api.llama_get_memory(self._context)
            self._batch = RowBatch(self._api, options.batch_size)
        except BaseException:
            self.close()
            raise
        self.context = min(options.context, int(self._api.llama_n_ctx(self._context)))
        self._num_tokens = 0
        self._num_logits = int(
            self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))
        )

    def _create_context(self, options: LoadOptions) -> Any:
        params = context_parameters(self._api, options)
        return _created(
            self._library,
            lambda: self._api.llama_init_from_model(self._model, params),
            f"a context of {options.context} tokens for {self.spec.name}",
        )

    @property
    def num_tokens(self) -> int:
        """How many tokens are in the KV cache."""
        return self._num_tokens

    def forward(self, token_ids: Sequence[int]) -> Logits:
        """Append the tokens in one llama.cpp batch and return the last row's logits."""
        import numpy as np

        self._compute(token_ids)
        pointer = self._api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._num_logits,))

    def forward_rows(self, token_ids: Sequence[int]) -> Logits2D:
        """Append the tokens in one llama.cpp batch and return every row's logits."""
        self._check_verified(len(token_ids))
        self._compute(token_ids, every_row=True)
        return self._row_logits(len(token_ids))

    def _row_logits(self, num_rows: int) -> Logits2D:
        import numpy as np

        pointer = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(num_rows, self._num_logits))

    def _check_verified(self, num_rows: int) -> None:
        if num_rows > self.max_verify_batch:
            raise ForwardError(
                f"logits of {num_rows} rows are wanted, {self.max_verify_batch} are planned"
            )

    def _compute(self, token_ids: Sequence[int], *, every_row: bool = False) -> None:
        self._check_rows(token_ids)
        self._batch.fill(token_ids, self._num_tokens, every_row=every_row)
        with self._library.collected_errors() as errors:
            code = self._api.llama_decode(self._context, self._batch.struct)
        if code != 0:
            self._forget_from(self._num_tokens)
            reason = errors[-1] if errors else DECODE_ERRORS.get(code, f"llama.cpp says {code}")
            raise ForwardError(
                f"a forward pass over {len(token_ids)} rows at {self._num_tokens} failed: {reason}"
            )
        self._num_tokens += len(token_ids)

    def _check_rows(self, token_ids: Sequence[int]) -> None:
        if self._context is None:
            raise ForwardError("the model is closed: open it again")
        if not 0 < len(token_ids) <= self.batch_size:
            raise ForwardError(f"{len(token_ids)} rows given, 1 to {self.batch_size} are allowed")
        if self._num_tokens + len(token_ids) > self.context:
            raise ForwardError(
                f"{self._num_tokens + len(token_ids)} tokens do not fit the context of "
                f"{self.context}: truncate first"
            )
        if min(token_ids) < 0 or max(token_ids) >= self._num_logits:
            raise ForwardError(
                f"token {max(token_ids, key=abs)} is not in the vocabulary of {self._num_logits}"
            )

    def truncate(self, num_tokens: int) -> int:
        """Forget the tokens from `num_tokens` on; everything, where the model cannot go back."""
        if num_tokens < 0:
            raise ValueError(f"num_tokens is {num_tokens}, 0 or more is wanted")
        kept = min(num_tokens, self._num_tokens)
        used, self._num_tokens = self._num_tokens, self._forget_from(kept)
        if self.on_cut is not None:
            self.on_cut(used, self._num_tokens)
        return self._num_tokens

    def snapshot_component(self) -> dict[str, str]:
        """Return the weights, the KV type, and the llama.cpp that lays the cells out."""
        spec = self.spec
        weights = file_fingerprint(spec.paths)
        return {
            "model": f"{spec.name}, {spec.quantisation}, {weights}",
            "KV type": self._options.kv_type,
            "llama-cpp-python": self._library.version,
        }

    def save_kv(self, path: Path, token_ids: Sequence[int]) -> int:
        """Write the KV cache to a file in llama.cpp's format, one tensor at a time."""
        assert len(token_ids) == self._num_tokens, "these are not the tokens in the cache"
        return write_state(self._library, self._context, path, token_ids)

    def load_kv(self, path: Path, num_bytes: int, num_tokens: int) -> list[int]:
        """Put a file's tokens and cells back; cells that hold no token stay untouched."""
        self.truncate(0)
        require_tokens(self._library, path, num_bytes, num_tokens, self._num_logits)
        try:
            token_ids = read_state(self._library, self._context, path, num_bytes, self.context)
        except BaseException:
            self._forget_from(0)
            raise
        self._num_tokens = len(token_ids)
        return token_ids

    def state_bytes(self) -> int:
        """Return the bytes of the cells that hold tokens, and of llama.cpp's notes on them."""
        return state_bytes(self._library, self._context)

    def copy_kv(self, into: memoryview) -> None:
        """Copy the cells that hold tokens, a tensor at a time."""
        copy_kv(self._library, self._context, into)

    def put_kv(self, state: memoryview, num_tokens: int) -> None:
        """Put the cells back; those that hold no token stay untouched."""
        self.truncate(0)
        try:
            put_kv(self._library, self._context, state, num_tokens)
        except BaseException:
            self._forget_from(0)
            raise
        self._num_tokens = num_tokens

    def open_sequences(
        self, num_sequences: int, num_cells: int, max_logits: int | None = None
    ) -> SequenceBatch:
        """Make another context, of which every cell is cleared, so that all of it is resident."""
        if not self.supports_batch:
            return super().open_sequences(num_sequences, num_cells)
        wanted = max(max_logits or 0, num_sequences)
        options = replace(
            self._options,
            context=num_cells,
            verify_batch=wanted,
            sequences=num_sequences,
            stage=nullcontext,
        )
        return GgufSequences(
            self._library,
            self._create_context(options),
            num_sequences=num_sequences,
            batch_size=self.batch_size,
            max_logits=wanted,
            vocabulary_size=self._num_logits,
        )

    def _forget_from(self, position: int) -> int:
        """Remove every cell from `position` on, also those of a pass that was interrupted."""
        if position > 0 and self._api.llama_memory_seq_rm(self._memory, 0, position, -1):
            return position
        self._api.llama_memory_clear(self._memory, False)
        return 0

    def close(self) -> None:
        """Free the context, and the weights where they are its own."""
        self.on_cut = None
        if self._batch is not None:
            self._batch.free()
            self._batch = None
        if self._context is not None:
            self._api.llama_free(self._context)
            self._context = None
        if self._model is not None and self._owns_weights:
            self._api.llama_model_free(self._model)
        self._model = None


def _load_weights(library: LlamaLibrary, spec: ModelSpec, options: LoadOptions) -> Any:
    params = model_parameters(
        library.api,
        memory_map=options.memory_map,
        repack=options.repack and library.repacks,
        gpu_layers=options.gpu_layers,
        gpu_attention=options.gpu_attention,
    )
    path = os.fsencode(spec.path)
    return _created(
        library,
        lambda: library.api.llama_model_load_from_file(path, params),
        f"{spec.path} ({spec.architecture})",
    )


def _created(library: LlamaLibrary, create: Callable[[], Any], what: str) -> Any:
    with library.collected_errors() as errors:
        made = create()
        if made:
            return made
        reason = next((e for e in errors if "unknown model architecture" in e), None)
        if reason is not None:
            raise UnsupportedModel(
                f"llama.cpp {library.version} cannot run {what}: {reason.split(': ', 1)[-1]}; "
                "upgrade llama-cpp-python or pick another model"
            )
        detail = errors[0] if errors else "no reason given"
        raise ModelError(f"llama.cpp cannot make {what}: {detail}")
