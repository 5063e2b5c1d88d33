"""Attention over states called on arrays, outside any graph: what tests and measurements use."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from lowtide.attention.kernels import AttentionInputs
from lowtide.attention.native_library import native_library
from lowtide.models.errors import LowtideError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class StatesRule(ctypes.Structure):
    """The C++ `StatesRule`, field for field.

    Each row sees its last `window` keys as they are, and of those behind them whole pages of 64 as states.
    The first `num_first` keys of all are sent whole; of others blocks of `block` channels, 1, 8 or 16.
    A state with more than the share `opens` of a head's weight is replaced by its key in decoding; 0: none.
    """

    _fields_ = [
        ("window", ctypes.c_int32),
        ("num_first", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("opens", ctypes.c_float),
    ]


class ScoreCounts(ctypes.Structure):
    """The C++ `ScoreCounts`, field for field; of each pass's last row, a channel of a key counted once.

    `channels_held` are all that it sees, `channels_behind` those of states, of which `channels_sent` were
    sent; `channels_multiplied` is what scores really cost, the window and opened keys among it.
    `key_bytes_held` are those of all keys in the cache, `key_bytes_read` of states and the other keys.
    """

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "channels_held channels_behind channels_sent channels_multiplied key_bytes_held "
            "key_bytes_read".split()
        )
    ]


class StatesLayer:
    """One layer that keeps its states from pass to pass; close it.

    `thresholds` (kv_heads,) are how far a block may be off, as multiples of 1 over `scales` (kv_heads,
    key_size); `shares` (kv_heads,) how much of a page is sent at the most, by a threshold of the page's
    own, 1 where the stated one says. Raises `LowtideError` where that cannot be.
    """

    def __init__(
        self,
        rule: StatesRule,
        thresholds: NDArray[np.float32],
        shares: NDArray[np.float32],
        scales: NDArray[np.float32],
    ) -> None:
        self._library = native_library()
        pointer = ctypes.c_void_p
        self._library.lowtide_states_new.restype = pointer
        self._library.lowtide_states_new.argtypes = [pointer] * 4 + [ctypes.c_int] * 2
        self._library.lowtide_states_attend.argtypes = [
            *(pointer, pointer, ctypes.c_char_p, ctypes.c_int, pointer)
        ]
        self._library.lowtide_states_free.argtypes = [pointer]
        self._library.lowtide_states_free.restype = None
        self._layer = self._library.lowtide_states_new(
            ctypes.byref(rule),
            thresholds.ctypes.data,
            shares.ctypes.data,
            scales.ctypes.data,
            *scales.shape,
        )
        if not self._layer:
            raise LowtideError(
                f"blocks of {rule.block} channels cannot be sent of heads of {scales.shape[1]}: 1, 8 or 16 "
                "of a multiple of 16 up to 256 are wanted, behind a window of 1 or more"
            )
        self.counts = ScoreCounts()

    def attend(
        self, inputs: AttentionInputs, *, kernels: str | None = None, threads: int = 1
    ) -> NDArray[np.float32]:
        """Attend with the rows of a pass; each sees a beginning of the cache, one cell more than the last.

        Returns the result, (rows, heads, value_size), zeros where the mask is of another kind; `counts` are
        of all passes up to this one.
        """
        import numpy as np

        out = np.zeros((*inputs.q.shape[:2], inputs.value_size), np.float32)
        problem = inputs.problem(out, None)
        failure = self._library.lowtide_states_attend(
            self._layer,
            ctypes.byref(problem),
            kernels.encode() if kernels else None,
            threads,
            ctypes.byref(self.counts),
        )
        if failure:
            raise LowtideError(
                f"these shapes cannot be attended to with {kernels or 'any'} kernels"
            )
        return out

    def close(self) -> None:
        """Free the layer's states; closing twice is allowed."""
        if self._layer:
            self._library.lowtide_states_free(self._layer)
            self._layer = None
