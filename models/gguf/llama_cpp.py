"""llama.cpp's C API, imported without the rest of llama-cpp-python.

The package's own `__init__` imports its server types, caches and chat formats, which would cost the memory
budget 22 MiB, and 95 ms; only the generated C bindings are loaded here.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from lowtide.models.errors import ModelError

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

PACKAGE = "llama_cpp"
LOG_LEVEL_INFO = 2
LOG_LEVEL_ERROR = 4
LOG_LEVEL_CONTINUED = 5
_lock = threading.Lock()


class Tokenize(Protocol):
    """A call of llama_tokenize; `touched` receives the bytes of stack that it used, where that is known."""

    def __call__(
        self,
        vocabulary: Any,
        data: bytes,
        token_ids: ctypes.Array[ctypes.c_int32],
        *,
        add_special: bool,
        parse_special: bool,
        touched: ctypes.c_size_t | None = None,
    ) -> int:
        """Write the tokens of `data`; return how many they are, or less than 0 where they do not fit."""


class LlamaLibrary:
    """The bindings (`.api`) and llama.cpp's log; one per process, from `llama_library()`.

    `tokenize` calls llama.cpp's tokenizer, which a long text can crash; the layer above replaces it with a call
    that is guarded (`attention/bindings/tokenize.py`).
    """

    def __init__(self, api: Any) -> None:
        self.api = api
        self.tokenize: Tokenize = self._tokenize
        self._errors: deque[str] = deque(maxlen=64)
        self._thread = threading.local()
        self._level = 0
        # llama.cpp keeps the pointer for the life of the process, so this object must too.
        self._log_callback = api.llama_log_callback(self._receive)
        api.llama_log_set(self._log_callback, None)
        api.llama_backend_init()
        self._compute_thread: ThreadPoolExecutor | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._compute_on_own_thread)

    def decode(self, context: Any, batch: Any) -> int:
        """Run llama.cpp's forward pass of `batch`; return its code, 0 for success."""
        if self._compute_thread is None:
            return int(self.api.llama_decode(context, batch))
        return self._compute_thread.submit(self.api.llama_decode, context, batch).result()  # type: ignore[no-any-return]

    def _compute_on_own_thread(self) -> None:
        """Compute on a thread of its own in a forked child.

        OpenMP keeps the threads of a parallel region with the thread that started it. After a fork, the child's first
        thread waits for ever for threads of its parent; a new thread starts its own.
        """
        from concurrent.futures import ThreadPoolExecutor

        self._compute_thread = ThreadPoolExecutor(1, thread_name_prefix="lowtide")

    def _receive(self, level: int, text: bytes, _user_data: object) -> None:
        if level != LOG_LEVEL_CONTINUED:
            self._level = level
        if self._level == LOG_LEVEL_ERROR:
            self._errors.append(text.decode("utf-8", errors="replace").strip())
        elif self._level == LOG_LEVEL_INFO:
            messages: list[str] | None = getattr(self._thread, "messages", None)
            if messages is not None:
                messages.append(text.decode("utf-8", errors="replace").strip())

    def _tokenize(
        self,
        vocabulary: Any,
        data: bytes,
        token_ids: ctypes.Array[ctypes.c_int32],
        *,
        add_special: bool,
        parse_special: bool,
        touched: ctypes.c_size_t | None = None,
    ) -> int:
        return int(
            self.api.llama_tokenize(
                vocabulary, data, len(data), token_ids, len(token_ids), add_special, parse_special
            )
        )

    @contextlib.contextmanager
    def collected_errors(self) -> Iterator[deque[str]]:
        """Yield the error messages that llama.cpp logs inside the block."""
        self._errors.clear()
        yield self._errors

    @contextlib.contextmanager
    def collected_messages(self) -> Iterator[list[str]]:
        """Yield the lines that llama.cpp logs on this thread inside the block."""
        self._thread.messages = messages = list[str]()
        try:
            yield messages
        finally:
            self._thread.messages = None

    def set_abort_callback(self, address: int) -> None:
        """Have ggml call the C function at `address` (void (const char *)) when an assertion fails."""
        self.api._lib.ggml_set_abort_callback(ctypes.c_void_p(address))

    def address(self, function: str) -> int:
        """Return the address of a C function of llama.cpp or ggml."""
        try:
            address = ctypes.cast(getattr(self.api._lib, function), ctypes.c_void_p).value
        except AttributeError:
            address = None
        if address is None:
            raise ModelError(
                f"this version of llama-cpp-python has no {function}: install version 0.3.36"
            )
        return address

    @property
    def version(self) -> str:
        """The version of llama-cpp-python."""
        import importlib.metadata  # 3 MiB, for a line of `doctor` and of some errors

        return importlib.metadata.version("llama-cpp-python")

    @property
    def repacks(self) -> bool:
        """Whether llama.cpp may repack weights into layouts of its own: not where it was compiled for AMX.

        GCC before 14 loses most of the tile configuration that its AMX matmuls load, and the first of them then
        ends the process. The memory of such layouts is not planned either.
        """
        return "AMX_INT8 = 1" not in self.system_info

    @property
    def system_info(self) -> str:
        """llama.cpp's description of the instruction sets that its kernels use."""
        text: bytes = self.api.llama_print_system_info()
        return text.decode("utf-8", errors="replace").strip()


_library: LlamaLibrary | None = None


def llama_library() -> LlamaLibrary:
    """Load llama.cpp once; raise `ModelError` where llama-cpp-python is missing or does not load."""
    global _library
    with _lock:
        if _library is None:
            _library = LlamaLibrary(_import_bindings())
        return _library


def _import_bindings() -> ModuleType:
    imported = sys.modules.get(f"{PACKAGE}.{PACKAGE}")
    if imported is not None:
        return imported
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise ModelError(
            "llama-cpp-python, which runs GGUF models, is not installed: pip install llama-cpp-python"
        )
    # A stand-in package with the real search path: its submodules load, its __init__ does not run.
    stand_in = ModuleType(PACKAGE)
    stand_in.__path__ = list(spec.submodule_search_locations)
    sys.modules[PACKAGE] = stand_in
    try:
        bindings = importlib.import_module(f"{PACKAGE}.{PACKAGE}")
    except (OSError, RuntimeError, AttributeError) as error:
        raise ModelError(
            f"llama-cpp-python does not load ({error}): reinstall it for this machine"
        ) from error
    finally:
        # A later `import llama_cpp` by the user must find the whole package.
        for name in [n for n in sys.modules if n == PACKAGE or n.startswith(f"{PACKAGE}.")]:
            del sys.modules[name]
    _check_layout(bindings)
    return bindings


def _check_layout(api: Any) -> None:
    """Raise `ModelError` where llama-cpp-python's parameter structs lack a field that lowtide sets."""
    required = {
        "llama_model_params": ("load_mode", "use_extra_bufts", "n_gpu_layers"),
        "llama_context_params": ("n_outputs_max", "flash_attn_type", "cb_eval", "swa_full"),
    }
    for name, fields in required.items():
        struct: type[ctypes.Structure] = getattr(api, name)
        present = {field[0] for field in struct._fields_}
        missing = [field for field in fields if field not in present]
        if missing:
            raise ModelError(
                f"this version of llama-cpp-python has no {name}.{missing[0]}, which version 0.3.36 or newer "
                "has: pip install --upgrade llama-cpp-python"
            )
