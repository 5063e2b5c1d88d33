"""SimulatedGguf: what llama.cpp would allocate for a model's contexts, without allocating it.

With `no_alloc` llama.cpp lays a model out in milliseconds: it reads the vocabulary but allocates no weights,
KV cache or compute buffer. The sizes come from its log messages, which round to a hundredth of a MiB.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from lowtide.models.errors import ModelError
from lowtide.models.gguf.header.kind import llama_kind
from lowtide.models.gguf.llama_cpp import llama_library
from lowtide.models.gguf.parameters import LoadOptions, context_parameters, model_parameters
from lowtide.models.gguf.text.tokenizer import GgufTokenizer
from lowtide.models.kind import Kind
from lowtide.models.spec import ModelSpec

_COMPUTE = re.compile(r"compute buffer size = +(\d+\.\d+) MiB")
_CACHE = re.compile(r"^llama_(?:kv_cache|memory_recurrent).*: size = +(\d+\.\d+) MiB")
_ROUNDING_BYTES = (1 << 20) // 200


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedContext:
    """The bytes of one context: the KV cache for all its tokens, and the compute buffer.

    The KV cache is rounded down, so that an exact formula is never below it.
    """

    cache_bytes: int
    compute_bytes: int


class SimulatedGguf:
    """A model that is laid out but not loaded; close it before the real one is loaded.

    Raises `ModelError` where llama.cpp refuses the model.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._library = llama_library()
        self._api = self._library.api
        self._contexts: dict[LoadOptions, SimulatedContext] = {}
        self._held: Any = None
        params = model_parameters(self._api, memory_map=False, repack=True)
        params.no_alloc = True
        with self._library.collected_errors() as errors:
            self._model: Any = self._api.llama_model_load_from_file(os.fsencode(spec.path), params)
        if not self._model:
            reason = errors[0] if errors else "no reason given"
            raise ModelError(f"llama.cpp cannot lay out {spec.path}: {reason}")

    def context(self, context: int, batch_size: int, kv_type: str) -> SimulatedContext:
        """Return the size of a context of `context` tokens with batches of `batch_size`."""
        return self.laid_out(
            LoadOptions(context=context, batch_size=batch_size, threads=1, kv_type=kv_type)
        )

    def laid_out(self, options: LoadOptions) -> SimulatedContext:
        """Return the size of a context with these options."""
        if options not in self._contexts:
            self._contexts[options] = self._measured(options)
        return self._contexts[options]

    @property
    def num_laid_out(self) -> int:
        """How many contexts were laid out so far; others are remembered."""
        return len(self._contexts)

    @property
    def tokenizer(self) -> GgufTokenizer:
        """The model's tokenizer, usable until `close`."""
        return GgufTokenizer(self._library, self._api.llama_model_get_vocab(self._model))

    def hold(self, context: int, batch_size: int, kv_type: str) -> None:
        """Lay out a context that stays until `release`: what is resident then includes its graph."""
        options = LoadOptions(context=context, batch_size=batch_size, threads=1, kv_type=kv_type)
        self._hold(options)

    def _hold(self, options: LoadOptions) -> None:
        with self._library.collected_messages() as messages:
            self._held = self._api.llama_init_from_model(
                self._model, context_parameters(self._api, options)
            )
        if not self._held:
            raise ModelError(f"llama.cpp cannot lay out a context for {self._spec.name}")
        self.kind: Kind = llama_kind(self._api, self._model, self._held, messages)

    def release(self) -> None:
        """Free the context that is held, if any is."""
        if self._held:
            self._api.llama_free(self._held)
        self._held = None

    def _measured(self, options: LoadOptions) -> SimulatedContext:
        with self._library.collected_messages() as messages:
            handle = self._api.llama_init_from_model(
                self._model, context_parameters(self._api, options)
            )
        if not handle:
            raise ModelError(f"llama.cpp cannot lay out a context for {self._spec.name}")
        self._api.llama_free(handle)
        compute = [_num_bytes(match[1]) for m in messages if (match := _COMPUTE.search(m))]
        cache = [
            _num_bytes(match[1]) - 2 * _ROUNDING_BYTES
            for m in messages
            if (match := _CACHE.search(m))
        ]
        if not compute:
            raise ModelError("llama.cpp does not report the size of its compute buffer")
        return SimulatedContext(cache_bytes=sum(cache), compute_bytes=sum(compute))

    def close(self) -> None:
        """Free the layout; closing twice is allowed."""
        self.release()
        if self._model is not None:
            self._api.llama_model_free(self._model)
            self._model = None


def _num_bytes(mebibytes: str) -> int:
    return int(float(mebibytes) * (1 << 20)) + _ROUNDING_BYTES
