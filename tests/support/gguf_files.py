"""Write small GGUF models of random weights: speed and memory do not depend on their values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np


def write_model(
    path: Path,
    *,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    feed_forward: int = 128,
    vocabulary: int = 320,
    context: int = 1024,
    architecture: str = "llama",
    chat_template: str | None = None,
    overrides: dict[str, int] | None = None,
    quantised: str | None = None,
    halves: tuple[str, ...] = (),
    extra: dict[str, object] | None = None,
    word: str = "word",
    control: tuple[str, ...] = (),
    changed: Callable[[str, np.ndarray], np.ndarray] = lambda _name, values: values,
    name: str = "random",
) -> Path:
    """Write a llama-shaped model in F32 with a byte vocabulary; `overrides` replaces header numbers.

    `extra` are more keys of the header, with texts or lists of texts; `word` begins the words of the vocabulary,
    and `control` are its control tokens beside <s> and </s>.

    `changed` returns the values of a tensor in place of its random ones, by its name.

    `quantised`, one of `BLOCKS`, is the matrices' type, but for those with one of `halves` in their names:
    F16.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    numbers = {
        "block_count": layers,
        "embedding_length": width,
        "feed_forward_length": feed_forward,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "context_length": context,
        "rope.dimension_count": width // heads,
        **(overrides or {}),
    }
    for name, number in numbers.items():
        writer.add_uint32(f"{architecture}.{name}", number)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    add_vocabulary(writer, vocabulary, word, control)
    for name, value in (extra or {}).items():
        if isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)  # type: ignore[arg-type]
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    shape = (layers, width, heads, kv_heads, feed_forward, vocabulary)
    _add_tensors(writer, *shape, quantised=quantised, halves=halves, changed=changed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_vocabulary(
    writer: gguf.GGUFWriter, vocabulary: int, word: str, control: tuple[str, ...]
) -> None:
    """Write a vocabulary of bytes and words; `control` are control tokens beside <s> and </s>."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts += control
    texts += [f"▁{word}{i}" for i in range(vocabulary - len(texts))]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    kinds += [gguf.TokenType.CONTROL] * len(control)
    kinds += [gguf.TokenType.NORMAL] * (vocabulary - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _add_tensors(
    writer: gguf.GGUFWriter,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    feed_forward: int,
    vocabulary: int,
    *,
    quantised: str | None,
    halves: tuple[str, ...],
    changed: Callable[[str, np.ndarray], np.ndarray],
) -> None:
    random = np.random.default_rng(7)
    kv_width = width // heads * kv_heads

    def add(name: str, rows: int, columns: int) -> None:
        scale = 1 / np.sqrt(columns)
        is_half = any(part in name for part in halves)
        if quantised is not None and not is_half:
            data = BLOCKS[quantised](random, rows * columns, scale).reshape(rows, -1)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[quantised])
            return
        values = random.standard_normal((rows, columns)) * scale
        values = values.astype(np.float16 if is_half else np.float32)
        writer.add_tensor(name, changed(name, values))

    def add_norm(name: str) -> None:
        writer.add_tensor(name, changed(name, np.ones(width, np.float32)))

    add("token_embd.weight", vocabulary, width)
    for layer in range(layers):
        add_norm(f"blk.{layer}.attn_norm.weight")
        add(f"blk.{layer}.attn_q.weight", width, width)
        add(f"blk.{layer}.attn_k.weight", kv_width, width)
        add(f"blk.{layer}.attn_v.weight", kv_width, width)
        add(f"blk.{layer}.attn_output.weight", width, width)
        add_norm(f"blk.{layer}.ffn_norm.weight")
        add(f"blk.{layer}.ffn_gate.weight", feed_forward, width)
        add(f"blk.{layer}.ffn_up.weight", feed_forward, width)
        add(f"blk.{layer}.ffn_down.weight", width, feed_forward)
    add_norm("output_norm.weight")
    add("output.weight", vocabulary, width)


def _q4_0(random: np.random.Generator, num_weights: int, scale: float) -> np.ndarray:
    """Blocks of 32 random weights, 18 bytes each."""
    blocks = np.empty((num_weights // 32, 18), np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(scale / 8).tobytes(), np.uint8)
    blocks[:, 2:] = random.integers(0, 256, (len(blocks), 16), np.uint8)
    return blocks


def _q4_k(random: np.random.Generator, num_weights: int, scale: float) -> np.ndarray:
    """Blocks of 256 random weights, 144 bytes each; their mean is about zero."""
    blocks = np.empty((num_weights // 256, 144), np.uint8)
    halves = np.array([scale / 150, 7.5 * scale / 150], np.float16)
    blocks[:, :4] = np.frombuffer(halves.tobytes(), np.uint8)
    blocks[:, 4:] = random.integers(0, 256, (len(blocks), 140), np.uint8)
    return blocks


def _nvfp4(random: np.random.Generator, num_weights: int, _scale: float) -> np.ndarray:
    """Blocks of 64 random weights, 36 bytes each: four small scales, then 4-bit floats."""
    blocks = random.integers(0, 256, (num_weights // 64, 36), np.uint8)
    blocks[:, :4] = 0x08  # 2 ** -6
    return blocks


def _q1_0(random: np.random.Generator, num_weights: int, scale: float) -> np.ndarray:
    """Blocks of 128 random signs and one scale, 18 bytes each."""
    blocks = random.integers(0, 256, (num_weights // 128, 18), np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return blocks


BLOCKS = {"Q4_0": _q4_0, "Q4_K": _q4_k, "NVFP4": _nvfp4, "Q1_0": _q1_0}
