from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import pytest

import lowtide
from lowtide.attention.bindings import library as native
from lowtide.models.errors import LowtideError


def test_the_library_has_this_version() -> None:
    assert native.native_version() == lowtide.__version__


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc/cpuinfo")
def test_features_agree_with_the_kernel_sets() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(
        line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))
    )
    renamed = {"neon": "asimd", "dotprod": "asimddp", "fp16": "asimdhp"}
    known = (
        {
            "avx2",
            "fma",
            "f16c",
            "avx_vnni",
            "avx512f",
            "avx512bw",
            "avx512vl",
            "avx512_vnni",
            "avx512_bf16",
        }
        if platform.machine() == "x86_64"
        else {"neon", "dotprod", "fp16", "sve", "i8mm", "bf16"}
    )
    expected = {name for name in known if renamed.get(name, name) in flags}
    assert set(native.cpu_features()) == expected


@pytest.mark.parametrize("capacity", range(0, 40))
def test_a_short_buffer_is_never_overrun(capacity: int) -> None:
    library = native.native_library()
    guard = 16
    buffer = ctypes.create_string_buffer(b"\xaa" * (capacity + guard), capacity + guard)
    needed = library.lowtide_cpu_features(buffer, capacity)
    assert needed == len(" ".join(native.cpu_features()))
    assert buffer.raw[capacity:] == b"\xaa" * guard
    if capacity:
        assert b"\0" in buffer.raw[:capacity]


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    native.native_library.cache_clear()
    monkeypatch.setattr(native, "LIBRARY_NAME", "nothing.so")
    with pytest.raises(LowtideError, match="reinstall lowtide"):
        native.native_library()
    native.native_library.cache_clear()
