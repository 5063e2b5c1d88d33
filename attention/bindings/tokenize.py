"""llama.cpp's tokenizer on a thread with a stack of its own: no text can end the process.

llama.cpp cuts a text into words with std::regex, which recurses once for each character of a match. Measured with
every pre-tokenizer of llama-cpp-python 0.3.36: at most 326 bytes of stack a character.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from typing import Any

from lowtide.attention.bindings.library import guarded_aborts, native_library
from lowtide.memory.units import format_bytes
from lowtide.models.errors import ModelError
from lowtide.models.gguf.llama_cpp import llama_library, plain_reason

STACK_BYTES = 256 << 10
"""The stack for everything but the recursion."""
STACK_BYTES_PER_BYTE = 1024
"""The stack that is reserved for each byte of the text; only pages that the recursion reaches become resident."""
MESSAGE_BYTES = 1024
PIECE_BYTES = 8
"""Room for each token of a vocabulary at first, which most have on average; then as much as they need."""
FAILED = 1


@functools.cache
def install_guarded_tokenizer() -> None:
    """Let every `GgufTokenizer` of this process call llama.cpp through `guarded_tokenize`."""
    with guarded_aborts():
        library = llama_library()
        library.tokenize, library.tokens_with = guarded_tokenize, tokens_with
        library.token_pieces = token_pieces


def guarded_tokenize(
    vocabulary: Any,
    data: bytes,
    token_ids: ctypes.Array[ctypes.c_int32],
    *,
    add_special: bool,
    parse_special: bool,
    touched: ctypes.c_size_t | None = None,
) -> int:
    """Call llama_tokenize on a stack that its recursion cannot overflow; return what it returns.

    `touched` receives the bytes of that stack that were used. Raises `ModelError` where the tokenizer throws, or
    where the system has no address space for the stack.
    """
    stack_bytes = STACK_BYTES + STACK_BYTES_PER_BYTE * len(data)
    count, message = ctypes.c_int32(), ctypes.create_string_buffer(MESSAGE_BYTES)
    status = _function()(
        _address("llama_tokenize"),
        ctypes.cast(vocabulary, ctypes.c_void_p),
        data,
        len(data),
        token_ids,
        len(token_ids),
        add_special,
        parse_special,
        stack_bytes,
        ctypes.byref(count),
        None if touched is None else ctypes.byref(touched),
        message,
        MESSAGE_BYTES,
    )
    if status == FAILED:
        reason = plain_reason(message.value.decode("utf-8", errors="replace"))
        raise ModelError(
            f"llama.cpp cannot tokenise this text of {len(data):,} bytes with the model's vocabulary ({reason}): use "
            "another conversion of the model"
        )
    if status != 0:
        raise ModelError(
            f"a text of {len(data):,} bytes needs {format_bytes(stack_bytes)} of address space to be tokenised, and "
            "the system does not give it: shorten the text, or raise the limit (ulimit -v)"
        )
    return count.value


def tokens_with(vocabulary: Any, num_tokens: int, attributes: int) -> list[int]:
    """Return the tokens that have one of these bits in their attributes; a vocabulary has up to 262,144."""
    function = native_library().lowtide_tokens_with
    function.restype = ctypes.c_int32
    function.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32),
        *(ctypes.POINTER(ctypes.c_int32), ctypes.c_int32),
    ]
    token_ids = (ctypes.c_int32 * 0)()
    for _ in range(2):
        count = function(
            _address("llama_vocab_get_attr"),
            ctypes.cast(vocabulary, ctypes.c_void_p),
            num_tokens,
            attributes,
            token_ids,
            len(token_ids),
        )
        if count <= len(token_ids):
            break
        token_ids = (ctypes.c_int32 * count)()
    return list(token_ids)


def token_pieces(vocabulary: Any, num_tokens: int) -> tuple[bytes, array[int]]:
    """Return the bytes of all tokens one after the other, and where each token begins and the last one ends."""
    function = native_library().lowtide_token_pieces
    function.restype = ctypes.c_int64
    function.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32),
        *(ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p),
    ]
    starts = array("I", bytes(4 * (num_tokens + 1)))
    capacity = PIECE_BYTES * num_tokens
    while True:
        text = ctypes.create_string_buffer(capacity)
        size = function(
            _address("llama_token_to_piece"),
            ctypes.cast(vocabulary, ctypes.c_void_p),
            num_tokens,
            text,
            capacity,
            starts.buffer_info()[0],
        )
        if size <= capacity:
            return text.raw[:size] if size < capacity else text.raw, starts
        capacity = size


@functools.cache
def _address(function: str) -> int:
    return llama_library().address(function)


@functools.cache
def _function() -> Any:
    function = native_library().lowtide_tokenize
    function.restype = ctypes.c_int
    function.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32),
        *(ctypes.POINTER(ctypes.c_int32), ctypes.c_int32, ctypes.c_int, ctypes.c_int),
        *(ctypes.c_size_t, ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_size_t)),
        *(ctypes.c_char_p, ctypes.c_size_t),
    ]
    return function
