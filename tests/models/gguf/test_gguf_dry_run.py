"""The sizes of a dry run are those that llama.cpp allocates."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gguf_files import write_model

from lowtide.memory.plan.estimates import kv_bytes
from lowtide.models.catalog import resolve
from lowtide.models.errors import ModelError
from lowtide.models.gguf.dry_run import SimulatedGguf
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.gguf.llama_cpp import llama_library
from lowtide.models.gguf.model import GgufModel
from lowtide.models.gguf.parameters import LoadOptions

CASES = [(512, 32, "f16"), (2048, 128, "f16"), (2048, 64, "q8_0"), (1024, 32, "q4_0")]


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_the_sizes_are_those_of_the_real_context(name: str) -> None:
    spec = read_spec(resolve(name))
    simulated = SimulatedGguf(spec)
    sizes_of = {case: simulated.context(*case) for case in CASES}
    simulated.close()
    simulated.close()
    for (context, batch_size, kv_type), sizes in sizes_of.items():
        options = LoadOptions(context=context, batch_size=batch_size, threads=1, kv_type=kv_type)
        with llama_library().collected_messages() as messages, GgufModel(spec, options):
            pass
        lines = "\n".join(messages)
        compute = re.findall(r"compute buffer size = +([\d.]+) MiB", lines)
        cache = re.findall(r"KV buffer size = +([\d.]+) MiB", lines)
        assert compute and cache
        logged_bytes = sum(map(float, compute)) * 2**20
        assert logged_bytes <= sizes.compute_bytes <= logged_bytes + len(compute) * 2**20 / 100
        cache_bytes = kv_bytes(spec, context, kv_type)
        assert cache_bytes - 2**20 / 25 <= sizes.cache_bytes <= cache_bytes
        assert abs(sum(map(float, cache)) * 2**20 - cache_bytes) < 2**20 / 25


def test_a_model_that_llama_cpp_does_not_know(tmp_path: Path) -> None:
    spec = read_spec(write_model(tmp_path / "odd.gguf", architecture="lowtide-test"))
    with pytest.raises(ModelError, match="cannot lay out"):
        SimulatedGguf(spec)
