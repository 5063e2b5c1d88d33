"""What is built here runs on older x86-64 processors, or is refused in a sentence: under qemu-user."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import emulated
import pytest

from lowtide.models.catalog import resolve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="these processors are x86-64"),
]
EMULATOR = "qemu-x86_64"


@pytest.fixture(scope="module")
def site() -> Path:
    emulated.require(EMULATOR)
    return emulated.made_site()


def python(processor: str) -> list[str]:
    """Return the command of this Python without its packages, on a processor."""
    return [EMULATOR, "-cpu", processor, sys.executable, "-S"]


# llama.cpp's kernels are those of one build on both. lowtide's differ by instruction set, and in rounding.
def test_the_same_tokens_on_avx2(site: Path, model: str) -> None:
    options = ("-m", model, "--reference")
    expected = emulated.greedy_tokens([sys.executable, "-S"], *options, PYTHONPATH=str(site))
    older = emulated.greedy_tokens(python("Haswell"), *options, PYTHONPATH=str(site))
    assert older == expected


def test_a_library_that_needs_avx2_is_refused_without_it(site: Path, model: str) -> None:
    done = emulated.run(python("Nehalem"), "run", "-m", model, "-p", "Hello", PYTHONPATH=str(site))
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert "needs a processor with AVX2, FMA3, F16C, which this one lacks" in done.stderr


@pytest.fixture(scope="module")
def model() -> str:
    """The file of the default model: the emulated Python does not have its package."""
    return str(resolve("smollm2"))
