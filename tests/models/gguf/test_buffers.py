"""The buffers that llama.cpp reports while it loads a model."""

from __future__ import annotations

from pathlib import Path

from gguf_files import write_model

from lowtide.memory.units import MIB
from lowtide.models.gguf.buffers import Buffer, bytes_on, reported_buffers
from lowtide.models.gguf.model import GgufModel
from lowtide.models.gguf.parameters import LoadOptions
from lowtide.models.read_spec import read_spec

MESSAGES = (
    "load_tensors:      Vulkan0 model buffer size =    92.50 MiB",
    "load_tensors: offloaded 31/31 layers to GPU",
    "llama_kv_cache:    Vulkan0 KV buffer size =     2.00 MiB",
    "llama_kv_cache:    Vulkan0 KV buffer size =     1.00 MiB",
    "sched_reserve:    Vulkan0 compute buffer size =     3.00 MiB",
    "sched_reserve:    Vulkan0 compute buffer size =     2.00 MiB",
    "llama_context: Vulkan_Host  output buffer size =     0.50 MiB",
    "sched_reserve: Vulkan_Host compute buffer size =     0.00 MiB",
)


def test_buffers_are_read_from_the_messages() -> None:
    """Caches add up, as a model may have two; a compute buffer is laid out again, and the last one counts."""
    buffers = reported_buffers(MESSAGES)
    assert buffers == (
        Buffer("Vulkan0", "weights", 92 * MIB + MIB // 2),
        Buffer("Vulkan0", "KV cache", 3 * MIB),
        Buffer("Vulkan0", "compute buffer", 2 * MIB),
        Buffer("Vulkan_Host", "logits and sampling", MIB // 2),
    )
    assert bytes_on(buffers, "Vulkan_Host") == {"logits and sampling": MIB // 2}


def test_a_loaded_model_knows_its_buffers(tmp_path: Path) -> None:
    spec = read_spec(write_model(tmp_path / "model.gguf", layers=8))
    model = GgufModel(spec, LoadOptions(context=1024, batch_size=32, threads=1, memory_map=False))
    model.close()
    found = bytes_on(model.buffers, "CPU")
    assert found["KV cache"] == 8 * 1024 * 2 * 32 * 2
    assert abs(found["weights"] - spec.weight_bytes) <= MIB // 50
