"""LayerClock: how long each layer of a forward pass takes. Knows no policy and no model."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from lowtide.attention.graph_hook import GraphHook
from lowtide.attention.native_library import native_library


class LayerClock:
    """Takes the time of passes through a hook's graph; the hook must outlive it.

    A timed pass stops once a layer, behind the norm that begins the next one. Results stay bit for bit
    what they are. Attention's time is known where our kernels run.
    """

    def __init__(self, hook: GraphHook, num_layers: int) -> None:
        self._library = native_library()
        array = ctypes.POINTER(ctypes.c_int64)
        self._library.lowtide_clock_start.argtypes = [ctypes.c_void_p, ctypes.c_int]
        self._library.lowtide_clock_start.restype = None
        self._library.lowtide_clock_read.argtypes = [ctypes.c_void_p, array, array, ctypes.c_int]
        self._library.lowtide_clock_read.restype = None
        self._clock = hook.clock
        self._ends = (ctypes.c_int64 * num_layers)()
        self._attention = (ctypes.c_int64 * num_layers)()

    def start(self, *, timed: bool) -> None:
        """Begin before a pass; passes from now on are timed or not."""
        self._library.lowtide_clock_start(self._clock, timed)

    def read(self) -> tuple[Sequence[int], Sequence[int]]:
        """Return, of the pass that was timed, when each layer ended and its time in our attention.

        Both in nanoseconds, the first since `start`; 0 where a layer has not run, or not ours.
        """
        self._library.lowtide_clock_read(self._clock, self._ends, self._attention, len(self._ends))
        return self._ends[:], self._attention[:]
