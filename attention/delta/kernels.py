"""Attention over groups called on arrays, outside any graph: what tests and measurements use."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from lowtide.attention.kernels import AttentionInputs
from lowtide.attention.native_library import native_library
from lowtide.models.errors import LowtideError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class DeltaRule(ctypes.Structure):
    """The C++ `DeltaRule`, field for field.

    Each row's last `window` keys and the first `num_fixed` of all are never grouped. A group with more than
    the share `opens` of a head's weight is replaced by its keys in decoding; 0: none. `replaces` has a
    layer's own cells given back once groups stand for them, and no group opened.
    """

    _fields_ = [
        ("window", ctypes.c_int32),
        ("num_fixed", ctypes.c_int32),
        ("opens", ctypes.c_float),
        ("replaces", ctypes.c_int32),
    ]


class GroupedLayer:
    """One layer that keeps its groups from pass to pass; close it.

    `num_groups` (kv_heads,) is how many groups each page of 64 keys becomes, `scales` (kv_heads, key_size)
    what distances between keys are measured with; `lifts` (kv_heads,) times the mean square of a group's
    distances is added to its scores. Raises `LowtideError` where that cannot be.
    """

    def __init__(
        self,
        rule: DeltaRule,
        num_groups: NDArray[np.uint8],
        lifts: NDArray[np.float32],
        scales: NDArray[np.float32],
    ) -> None:
        self._library = native_library()
        self._library.lowtide_delta_new.restype = ctypes.c_void_p
        self._layer = self._library.lowtide_delta_new(
            ctypes.byref(rule),
            ctypes.c_void_p(num_groups.ctypes.data),
            ctypes.c_void_p(lifts.ctypes.data),
            ctypes.c_void_p(scales.ctypes.data),
            *scales.shape,
        )
        if not self._layer:
            raise LowtideError("a page cannot have so many groups, or there is no memory for them")

    def attend(
        self, inputs: AttentionInputs, *, kernels: str | None = None, threads: int = 1
    ) -> tuple[NDArray[np.float32], int]:
        """Attend with the rows of a pass; each sees a beginning of the cache, one cell more than the last.

        Returns the result, (rows, heads, value_size), and how many keys and groups the last row attended
        to, as a mean of the heads; -1, with a result of zeros, where the mask is of another kind.
        """
        import numpy as np

        out = np.zeros((*inputs.q.shape[:2], inputs.value_size), np.float32)
        problem, num_read = inputs.problem(out, None), ctypes.c_int()
        name = kernels.encode() if kernels else None
        failure = self._library.lowtide_delta_attend(
            ctypes.c_void_p(self._layer),
            ctypes.byref(problem),
            name,
            threads,
            ctypes.byref(num_read),
        )
        if failure:
            raise LowtideError(
                f"these shapes cannot be attended to with {kernels or 'any'} kernels"
            )
        return out, num_read.value

    def close(self) -> None:
        """Free the layer's groups; closing twice is allowed."""
        if self._layer:
            self._library.lowtide_delta_free(ctypes.c_void_p(self._layer))
            self._layer = None
