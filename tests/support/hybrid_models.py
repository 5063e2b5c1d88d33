"""Write small hybrid GGUF models of random weights: layers with attention between layers with a recurrent state."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from tests.support.gguf_files import add_vocabulary

WIDTH, HEADS, KV_HEADS, FEED_FORWARD, LAYERS, VOCABULARY = 64, 4, 2, 128, 4, 320


def write_lfm2(path: Path) -> Path:
    """Write an LFM2: short convolutions in layers 0 and 2, attention in layers 1 and 3."""
    random = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, "lfm2")
    writer.add_name("random")
    numbers = {
        "block_count": LAYERS,
        "embedding_length": WIDTH,
        "feed_forward_length": FEED_FORWARD,
        "attention.head_count": HEADS,
        "context_length": 1024,
        "shortconv.l_cache": 3,
        "vocab_size": VOCABULARY,
    }
    for name, number in numbers.items():
        writer.add_uint32(f"lfm2.{name}", number)
    writer.add_array("lfm2.attention.head_count_kv", [0, KV_HEADS] * (LAYERS // 2))
    writer.add_float32("lfm2.rope.freq_base", 10000.0)
    writer.add_float32("lfm2.attention.layer_norm_rms_epsilon", 1e-5)
    add_vocabulary(writer, VOCABULARY, "word", ())
    matrices = {"ffn_gate": (FEED_FORWARD, WIDTH), "ffn_up": (FEED_FORWARD, WIDTH)}
    matrices |= {"ffn_down": (WIDTH, FEED_FORWARD)}
    head = WIDTH // HEADS
    attention = {"attn_q": (WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH)}
    attention |= dict.fromkeys(("attn_k", "attn_v"), (head * KV_HEADS, WIDTH))
    convolution = {
        "shortconv.conv": (WIDTH, 3),
        "shortconv.in_proj": (3 * WIDTH, WIDTH),
        "shortconv.out_proj": (WIDTH, WIDTH),
    }

    def add(name: str, *shape: int) -> None:
        values = random.standard_normal(shape) / np.sqrt(shape[-1])
        values = values.astype(np.float32) if len(shape) > 1 else np.ones(shape, np.float32)
        writer.add_tensor(f"{name}.weight", values)

    add("token_embd", VOCABULARY, WIDTH)
    add("token_embd_norm", WIDTH)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm", WIDTH)
        add(f"blk.{layer}.ffn_norm", WIDTH)
        own = attention if layer % 2 else convolution
        for name, shape in (matrices | own).items():
            add(f"blk.{layer}.{name}", *shape)
        if layer % 2:
            add(f"blk.{layer}.attn_q_norm", head)
            add(f"blk.{layer}.attn_k_norm", head)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
