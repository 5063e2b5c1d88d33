"""Compiles the C++ core with its own tests into programs, for sanitizers and other processors."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "attention" / "native"
NATIVE = TESTS.parents[2] / "attention" / "native"
PRODUCTS = NATIVE / "products"
KERNELS = (
    "attend attend_avx2 attend_avx512 attend_bf16 attend_portable cpu_features find_kernels".split()
)
MULTIPLIERS = [f"multiply_{name}" for name in "avx2 dot i8mm portable vnni vnni512".split()]
PRODUCT = [
    *MULTIPLIERS,
    *"cpu_features find_products pack product quantised_rows unpack".split(),
]
POLICIES = (
    "delta_attend key_groups key_set key_states opened_groups opened_states page_clusters "
    "policy_attend state_attend tidal_attend unit_measures watched_scores"
).split()
GROUPS = "delta_attend key_groups opened_groups page_clusters unit_measures watched_scores".split()
STATES = "key_states opened_states state_attend unit_measures watched_scores".split()
PROGRAMS = {
    "attend": [*KERNELS, "key_set", "tidal_attend"],
    "delta_attend": [*KERNELS, *GROUPS],
    "layer_cells": ["layer_cells"],
    "layer_clock": ["layer_clock"],
    "onnx_attend": [*KERNELS, *POLICIES, *"onnx_attend onnx_masks prompt_scores".split()],
    "onnx_products": [*PRODUCT, "onnx_products"],
    "product": PRODUCT,
    "pass_parts": [*KERNELS, "pass_parts"],
    "prompt_scores": [*KERNELS, "prompt_scores"],
    "state_attend": [*KERNELS, *STATES],
    "sliced_product": ["sliced_product", "weight_stream"],
    "lazy_mappings": ["lazy_mappings"],
    "weight_stream": ["weight_stream"],
}
"""What of the library each test is linked with: none needs llama.cpp."""
LIBRARIES = {"lazy_mappings": "mapping_library"}
AVX512 = "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mfma -mf16c -Wno-maybe-uninitialized".split()
X86_FLAGS = {
    "attend_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "attend_avx512": AVX512,
    "attend_bf16": [*AVX512, "-mavx512bf16"],
    "multiply_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "multiply_vnni": ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
    "multiply_vnni512": [*AVX512, "-mavx512vnni"],
}

ARM_FLAGS = {
    "multiply_dot": ["-march=armv8.2-a+dotprod"],
    "multiply_i8mm": ["-march=armv8.2-a+dotprod+i8mm"],
}


class NativeBuild:
    """A folder of objects made with the same flags; each source is compiled once."""

    def __init__(self, compiler: str, folder: Path, flags: Sequence[str], *, x86: bool) -> None:
        self._folder = folder
        self._own_flags = X86_FLAGS if x86 else ARM_FLAGS
        self._common = [
            compiler,
            "-std=c++17",
            f"-I{NATIVE}",
            f"-I{PRODUCTS}",
            '-DLOWTIDE_VERSION="test"',
            *flags,
        ]

    def program(self, name: str) -> Path:
        """Build the test called `name` and return the program's path."""
        objects = [str(self.object(source)) for source in PROGRAMS[name]]
        if name in LIBRARIES:
            objects.append(self._linked(LIBRARIES[name], "-fPIC", "-shared"))
        return Path(self._linked(f"{name}_test", *objects, "-pthread", "-ldl"))

    def prepare(self) -> None:
        """Compile the sources of all tests, as many at a time as there are cores."""
        sources = {source for sources in PROGRAMS.values() for source in sources}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.object, sources))

    def object(self, source: str) -> Path:
        """The object of `source`, a file's name without its ending: compiled when first asked for."""
        path = self._folder / f"{source}.o"
        if not path.exists():
            own = self._own_flags.get(source, [])
            folder = NATIVE if (NATIVE / f"{source}.cpp").is_file() else PRODUCTS
            self._run(*own, "-c", str(folder / f"{source}.cpp"), "-o", str(path))
        return path

    def _linked(self, test: str, *more: str) -> str:
        path = str(self._folder / test)
        self._run(str(TESTS / f"{test}.cpp"), *more, "-o", path)
        return path

    def _run(self, *arguments: str) -> None:
        subprocess.run([*self._common, *arguments], check=True)
