"""llama.cpp in this process: the C API of the library that was found, and its log.

`binding/` finds the library, loads it and checks that its structs are those that lowtide declares.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, cast

from lowtide.models.background import BackgroundThread
from lowtide.models.gguf.binding.declarations import NUM_TENSOR_TYPES, CApi
from lowtide.models.gguf.binding.find import LibraryFile, find_library
from lowtide.models.gguf.binding.layout import check_layout
from lowtide.models.gguf.binding.loaded import LoadedLibrary
from lowtide.models.gguf.broken import BrokenContexts

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

LOG_LEVEL_INFO = 2
LOG_LEVEL_ERROR = 4
LOG_LEVEL_CONTINUED = 5
_lock = threading.Lock()


_SOURCE_FOLDER = re.compile(r"\S*/(?=[\w.+-]+\.(?:c|cc|cpp|cu|h|hpp|inl):\d+)")
_LOADING = re.compile(r"^(?:\w+: )?(?:error loading model(?: \w+)?: )+")


def plain_reason(message: str) -> str:
    """Return an error of llama.cpp without the folders of its sources and the names of its functions."""
    return _LOADING.sub("", _SOURCE_FOLDER.sub("", message.strip()))


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
    """The C API (`.api`) and llama.cpp's log; one per process, from `llama_library()`.

    `tokenize` calls llama.cpp's tokenizer, which a long text can crash, and `run_pass` its forward pass, which a tensor
    can; the layer above replaces them with calls that are guarded (`attention/bindings/tokenize.py`, `decode.py`), and
    brings `try_pass`, which runs a pass in a process of its own and returns why it failed.
    `tokens_with(vocabulary, num_tokens, attributes)` lists the tokens that have one of these bits of
    llama_token_attr; `token_pieces(vocabulary, num_tokens)` returns the bytes of all tokens one after the other, and
    where each begins. Raises `ModelError` where the library's structs are not those that lowtide declares.
    """

    def __init__(self, loaded: LoadedLibrary) -> None:
        self._loaded = loaded
        self.api: Any = CApi(loaded.address)
        self.tokenize: Tokenize = self._tokenize
        self.tokens_with: Callable[[Any, int, int], list[int]] = self._tokens_with
        self.token_pieces: Callable[[Any, int], tuple[bytes, array[int]]] = self._token_pieces
        self.run_pass: Callable[[str, Any, Any], int] = self._run_pass
        self.broken = BrokenContexts(self.api.llama_get_model)
        self.try_pass: Callable[[str, Any, Any], str | None] = lambda _name, _context, _batch: None
        self._errors: deque[str] = deque(maxlen=64)
        self._thread = threading.local()
        self._level = 0
        # llama.cpp keeps the pointer for the life of the process, so this object must too.
        self._log_callback = self.api.llama_log_callback(self._receive)
        self.api.llama_log_set(self._log_callback, None)
        loaded.load_plugins()
        check_layout(self.api, loaded.address, str(loaded.file))
        self.api.llama_backend_init()
        self._compute_thread: ThreadPoolExecutor | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._compute_on_own_thread)

    def decode(self, context: Any, batch: Any, function: str = "llama_decode") -> int:
        """Run `function`, llama_decode or llama_encode, over `batch`; return its code, 0 for success.

        Raises `ForwardError` for a context that an earlier pass left broken.
        """
        self.broken.require_whole(context)
        if self._compute_thread is None:
            return int(self.run_pass(function, context, batch))
        return self._compute_thread.submit(self.run_pass, function, context, batch).result()

    def free_context(self, context: Any) -> None:
        """Free a context, unless it is broken."""
        if context not in self.broken:
            self.api.llama_free(context)

    def free_weights(self, model: Any) -> None:
        """Free a model, unless a broken context reads its weights."""
        if not self.broken.hold_weights(model):
            self.api.llama_model_free(model)

    def _run_pass(self, function: str, context: Any, batch: Any) -> int:
        return int(getattr(self.api, function)(context, batch))

    def _compute_on_own_thread(self) -> None:
        """Compute on a thread of its own in a forked child.

        OpenMP keeps the threads of a parallel region with the thread that started it. After a fork, the child's first
        thread waits for ever for threads of its parent; a new thread starts its own.
        """
        from concurrent.futures import ThreadPoolExecutor

        self._compute_thread = ThreadPoolExecutor(1, thread_name_prefix="lowtide")

    def _tokens_with(self, vocabulary: Any, num_tokens: int, attributes: int) -> list[int]:
        attributes_of = self.api.llama_vocab_get_attr
        return [i for i in range(num_tokens) if attributes_of(vocabulary, i) & attributes]

    def _token_pieces(self, vocabulary: Any, num_tokens: int) -> tuple[bytes, array[int]]:
        pieces, starts = list[bytes](), array("I", [0])
        for token_id in range(num_tokens):
            length = -self.api.llama_token_to_piece(vocabulary, token_id, None, 0, 0, False)
            buffer = ctypes.create_string_buffer(max(length, 1))
            self.api.llama_token_to_piece(vocabulary, token_id, buffer, length, 0, False)
            pieces.append(buffer.raw[:length])
            starts.append(starts[-1] + length)
        return b"".join(pieces), starts

    def _receive(self, level: int, text: bytes, _user_data: object) -> None:
        if level != LOG_LEVEL_CONTINUED:
            self._level = level
        if self._level == LOG_LEVEL_ERROR:
            self._errors.append(plain_reason(text.decode("utf-8", errors="replace")))
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

    def log_error(self, text: str) -> None:
        """Add an error message of native code to those that llama.cpp logs."""
        self._errors.append(plain_reason(text))

    @contextlib.contextmanager
    def collected_messages(self) -> Iterator[list[str]]:
        """Yield the lines that llama.cpp logs on this thread inside the block.

        An outer block gets the lines of an inner one, too.
        """
        outer: list[str] | None = getattr(self._thread, "messages", None)
        self._thread.messages = messages = list[str]()
        try:
            yield messages
        finally:
            self._thread.messages = outer
            if outer is not None:
                outer.extend(messages)

    def tensor_type(self, number: int) -> tuple[str, int, int] | None:
        """Return ggml's name of a tensor type, the elements of a block and its bytes; None for an unknown number."""
        if not 0 <= number < NUM_TENSOR_TYPES:  # ggml reads its table without looking
            return None
        name = self._type_property("ggml_type_name", ctypes.c_char_p, number)
        block = self._type_property("ggml_blck_size", ctypes.c_int64, number)
        num_bytes = self._type_property("ggml_type_size", ctypes.c_size_t, number)
        if not name or block <= 0 or num_bytes <= 0:  # a type that was removed
            return None
        return str(name.decode()).upper(), int(block), int(num_bytes)

    def _type_property(self, function: str, result: Any, number: int) -> Any:
        return ctypes.CFUNCTYPE(result, ctypes.c_int)(self.address(function))(number)

    def set_abort_callback(self, address: int) -> None:
        """Have ggml call the C function at `address` (void (const char *)) when an assertion fails."""
        set_callback = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
        set_callback(self.address("ggml_set_abort_callback"))(address)

    def address(self, function: str) -> int:
        """Return the address of a C function of llama.cpp or ggml."""
        return self._loaded.address(function)

    def processor_code(self) -> tuple[int, int | None]:
        """Return where ggml's code for the processor begins and ends; None where it is a library of its own."""
        return self._loaded.processor_code()

    @property
    def file(self) -> LibraryFile:
        """The library's file, and what it came with."""
        return self._loaded.file

    @property
    def variant(self) -> str | None:
        """Which of several plug-ins for processors runs, such as "zen4"; None where there is one build."""
        return self._loaded.variant

    @property
    def version(self) -> str:
        """The version of the package that the library came with, or the library's own."""
        if self.file.version:
            return self.file.version
        names = ("llama_version", "ggml_commit")
        texts = (ctypes.CFUNCTYPE(ctypes.c_char_p)(self.address(name))() for name in names)
        return " ".join(text.decode(errors="replace") for text in texts)

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


class _InBackground:
    """The library with its forward passes on a thread of the lowest priority."""

    def __init__(self, library: LlamaLibrary) -> None:
        self._library = library
        self._thread = BackgroundThread()

    def decode(self, *arguments: Any) -> int:
        return self._thread.run(self._library.decode, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)


def in_background(library: LlamaLibrary) -> LlamaLibrary:
    """Return the same library, but for passes: they run on a thread of the lowest priority, as do OpenMP's threads."""
    return cast("LlamaLibrary", _InBackground(library))


_library: LlamaLibrary | None = None


def is_loaded() -> bool:
    """Whether llama.cpp is loaded already."""
    return _library is not None


def llama_library() -> LlamaLibrary:
    """Load llama.cpp once; raise `ModelError` where no library of it, or only another version, is here."""
    global _library
    with _lock:
        if _library is None:
            _library = LlamaLibrary(LoadedLibrary(find_library()))
        return _library
