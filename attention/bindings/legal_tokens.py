"""The mask of a constraint, applied to logits by the native library. A mask has one bit for each token."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

from lowtide.attention.bindings.library import native_library

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def best_legal(logits: NDArray[np.float32], mask: bytes) -> int | None:
    """Return the legal token with the largest of `logits`, shape (tokens,); None where none is legal.

    Of equal ones it is the first. Bit `i & 7` of byte `i >> 3` of `mask` says that token `i` is legal.
    """
    import numpy as np

    values = np.ascontiguousarray(logits, np.float32)
    found = _library().lowtide_best_legal(values.ctypes.data, len(values), mask, len(mask))
    return None if found < 0 else int(found)


def legal_ids(mask: bytes, num_tokens: int) -> NDArray[np.int32]:
    """Return the legal ones of the first `num_tokens` tokens, ascending, shape (count,)."""
    import numpy as np

    ids = np.empty(num_tokens, np.int32)
    count = _library().lowtide_legal_ids(mask, len(mask), num_tokens, ids.ctypes.data, len(ids))
    return ids[:count]


@functools.cache
def _library() -> ctypes.CDLL:
    library = native_library()
    best, ids = library.lowtide_best_legal, library.lowtide_legal_ids
    best.restype = ids.restype = ctypes.c_int32
    best.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p, ctypes.c_size_t]
    ids.argtypes = [
        *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int32),
        *(ctypes.c_void_p, ctypes.c_int32),
    ]
    return library
