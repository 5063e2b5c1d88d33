"""llama-cpp-python's own low-level bindings, which lowtide's declarations are compared with.

The package's `__init__` is not run: it would take over the log of the library that lowtide has loaded.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

from lowtide.models.gguf.llama_cpp import llama_library

PACKAGE = "llama_cpp"


@functools.cache
def llama_bindings() -> Any:
    """Import `llama_cpp.llama_cpp`; its functions are those of llama-cpp-python's library."""
    llama_library()  # takes the log, which would go to stderr
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations is not None
    stand_in = ModuleType(PACKAGE)
    stand_in.__path__ = list(spec.submodule_search_locations)
    sys.modules[PACKAGE] = stand_in
    try:
        return importlib.import_module(f"{PACKAGE}.{PACKAGE}")
    finally:
        for name in [n for n in sys.modules if n == PACKAGE or n.startswith(f"{PACKAGE}.")]:
            del sys.modules[name]
