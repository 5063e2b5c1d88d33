"""FailingOp: an operation in a graph whose assertion fails on the thread and in the pass that a test asks for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from lowtide.attention.bindings.llama_hook import ggml_functions
from lowtide.models.gguf.llama_cpp import llama_library
from lowtide.models.gguf.parameters import LoadOptions
from lowtide.runtime.backends.gguf import LoadedGguf


class FailingOp:
    """Fails on one thread of a pass, -1 for all of them, while it is armed (tests/attention/native/failing_op.cpp).

    `library` is the path of `native_build.test_library`.
    """

    def __init__(self, library: str, thread: int) -> None:
        self._library = ctypes.CDLL(library)
        prepare = self._library.failing_op_prepare
        prepare.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
        prepare.restype = ctypes.c_char_p
        functions = ggml_functions()
        error = prepare(ctypes.byref(functions), llama_library().address("ggml_abort"), thread)
        assert error is None, error
        address = ctypes.cast(self._library.failing_op_callback, ctypes.c_void_p).value
        assert address is not None
        self._callback = (address, 0)

    def arm(self, armed: bool = True) -> None:
        """Let the operation fail from the next pass on, or no more."""
        self._library.failing_op_arm(int(armed))

    @contextmanager
    def in_models(self) -> Iterator[None]:
        """Put the operation into the graphs of the models that are loaded inside the block."""
        options: Callable[[Any], LoadOptions] = LoadedGguf._options

        def with_operation(loaded: LoadedGguf) -> LoadOptions:
            return replace(options(loaded), eval_callback=self._callback)

        LoadedGguf._options = with_operation  # type: ignore[method-assign]
        try:
            yield
        finally:
            LoadedGguf._options = options  # type: ignore[method-assign]
