"""BrokenContexts: contexts of llama.cpp in which an assertion failed in the middle of a forward pass.

Threads that stopped in the pass may still read what it used. So neither such a context, nor its weights, nor the
kernels in its graph are ever freed; the process and its other contexts go on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from lowtide.models.errors import ForwardError


class BrokenContexts:
    """Knows the broken contexts of this process by their addresses, which are never given to another context.

    `model_of` is llama_get_model.
    """

    def __init__(self, model_of: Callable[[Any], int | None]) -> None:
        self._model_of = model_of
        self._reasons: dict[int, str] = {}
        self._models: set[int] = set()

    def add(self, context: Any, reason: str) -> None:
        """Declare a context broken, because of a failed assertion."""
        address = _address(context)
        self._reasons[address] = reason
        self._models.add(_address(self._model_of(address)))

    def __contains__(self, context: Any) -> bool:
        return bool(self._reasons) and _address(context) in self._reasons

    def hold_weights(self, model: Any) -> bool:
        """Return whether a broken context reads the weights of `model`."""
        return bool(self._models) and _address(model) in self._models

    def require_whole(self, context: Any) -> None:
        """Raise `ForwardError` where the context is broken."""
        if context in self:
            raise ForwardError(
                f"the model stopped at an error of llama.cpp ({self._reasons[_address(context)]}): open it again"
            )


def _address(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0
