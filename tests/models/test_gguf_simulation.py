"""What llama.cpp lays out is what it allocates."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gguf_files import write_model

from lowtide.models.catalog import resolve
from lowtide.models.errors import ModelError
from lowtide.models.gguf_header import read_spec
from lowtide.models.gguf_model import GgufModel
from lowtide.models.gguf_options import LoadOptions
from lowtide.models.gguf_simulation import SimulatedGguf
from lowtide.models.llama_library import llama_library

CASES = [(512, 32, "f16"), (2048, 128, "f16"), (2048, 64, "q8_0"), (1024, 32, "q4_0")]


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_the_sizes_are_those_of_the_real_context(name: str) -> None:
    spec = read_spec(resolve(name))
    simulated = SimulatedGguf(spec)
    told = {case: simulated.context(*case) for case in CASES}
    simulated.close()
    simulated.close()
    for (context, max_rows, kv_type), sizes in told.items():
        options = LoadOptions(context=context, max_rows=max_rows, threads=1, kv_type=kv_type)
        with llama_library().collected_messages() as messages, GgufModel(spec, options):
            pass
        lines = "\n".join(messages)
        compute = re.findall(r"compute buffer size = +([\d.]+) MiB", lines)
        cache = re.findall(r"KV buffer size = +([\d.]+) MiB", lines)
        assert compute and cache
        for wanted, found in ((compute, sizes.compute_bytes), (cache, sizes.cache_bytes)):
            exact = sum(map(float, wanted)) * 2**20
            assert exact <= found <= exact + len(wanted) * 2**20 / 100


def test_a_model_that_llama_cpp_does_not_know(tmp_path: Path) -> None:
    spec = read_spec(write_model(tmp_path / "odd.gguf", architecture="lowtide-test"))
    with pytest.raises(ModelError, match="cannot lay out"):
        SimulatedGguf(spec)
