"""Write tiny quantised GGUF decoders of several architectures, each with an F32 copy of its values."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

LAYERS, WIDTH, FEED_FORWARD, HEADS, KV_HEADS, VOCABULARY = 7, 64, 96, 4, 2, 320
WINDOW = 8
MERGES = (
    "1 2|3 4|12 3|12 34|Ġ t|Ġt i|t i|ti d|tid e|Ġ tide|Ġt ide|' s|' S|Ċ Ċ|! Ċ|! !|Ġ !|Ġ Ġ|Ġ 1|Ġ 12|d e"
    "|s 1|Ã ©|ĠĠ Ġ|Ċ t|ĉ Ġ"
).split("|")
HEAD_SIZES = {"qwen2": WIDTH // HEADS}
"""llama.cpp has no other size for this architecture; others have 32."""
EPSILON = "attention.layer_norm_rms_epsilon"


def write_pair(
    folder: Path, architecture: str, kind: str, *, tied: bool = True, before: str | None = None
) -> tuple[Path, Path]:
    """Write `quantised.gguf`, its matrices of `kind`, and `exact.gguf`, F32 of the same values.

    With `before` the vocabulary is byte pairs, cut by that pattern; else it is SentencePiece's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "quantised.gguf", folder / "exact.gguf"
    for path in paths:
        random = np.random.default_rng(11)
        writer = gguf.GGUFWriter(path, architecture)
        _add_header(writer, architecture)
        _add_pieces(writer) if before is None else _add_byte_pairs(writer, before)
        for name, shape in _shapes(architecture, tied).items():
            numbers = _numbers(random, name, shape)
            quantised = len(shape) == 2
            ggml_type = gguf.GGMLQuantizationType[kind]
            data = gguf.quants.quantize(numbers, ggml_type) if quantised else numbers
            if path == paths[0] and quantised:
                writer.add_tensor(name, data, raw_dtype=ggml_type)
            else:
                exact = gguf.quants.dequantize(data, ggml_type) if quantised else data
                writer.add_tensor(name, exact.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def _head_size(architecture: str) -> int:
    return HEAD_SIZES.get(architecture, 32)


def _numbers(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name == "rope_freqs.weight":
        return np.linspace(1, 8, *shape, dtype=np.float32)
    if "norm" in name:
        return random.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) == 1:
        return random.uniform(-0.5, 0.5, shape).astype(np.float32)
    return (random.standard_normal(shape) * 1.5 / np.sqrt(shape[1])).astype(np.float32)


def _shapes(architecture: str, tied: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, WIDTH)}
    size = _head_size(architecture)
    queries, keys = HEADS * size, KV_HEADS * size
    for layer in range(LAYERS):
        matrices = {
            "attn_q": (queries, WIDTH),
            "attn_k": (keys, WIDTH),
            "attn_v": (keys, WIDTH),
            "attn_output": (WIDTH, queries),
            "ffn_gate": (FEED_FORWARD, WIDTH),
            "ffn_up": (FEED_FORWARD, WIDTH),
            "ffn_down": (WIDTH, FEED_FORWARD),
        }
        vectors = {"attn_norm": WIDTH, "ffn_norm": WIDTH}
        if architecture == "gemma3":
            vectors |= {"post_attention_norm": WIDTH, "post_ffw_norm": WIDTH}
        if architecture in ("gemma3", "qwen3"):
            vectors |= {"attn_q_norm": size, "attn_k_norm": size}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in matrices.items()}
        shapes |= {f"blk.{layer}.{name}.weight": (length,) for name, length in vectors.items()}
        if architecture == "qwen2":
            biases = {"attn_q": queries, "attn_k": keys, "attn_v": keys}
            shapes |= {f"blk.{layer}.{name}.bias": (length,) for name, length in biases.items()}
    if architecture == "llama":
        shapes["rope_freqs.weight"] = (size // 2,)
    if not tied:
        shapes["output.weight"] = (VOCABULARY, WIDTH)
    return {**shapes, "output_norm.weight": (WIDTH,)}


def _add_header(writer: gguf.GGUFWriter, architecture: str) -> None:
    numbers = {
        "block_count": LAYERS,
        "embedding_length": WIDTH,
        "feed_forward_length": FEED_FORWARD,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": _head_size(architecture),
        "attention.value_length": _head_size(architecture),
        "context_length": 256,
        "rope.dimension_count": _head_size(architecture),
    }
    if architecture == "gemma3":
        numbers["attention.sliding_window"] = WINDOW
    for name, number in numbers.items():
        writer.add_uint32(f"{architecture}.{name}", number)
    writer.add_name("tiny")
    writer.add_float32(f"{architecture}.{EPSILON}", 1e-5)
    writer.add_float32(f"{architecture}.rope.freq_base", 50_000.0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def _add_pieces(writer: gguf.GGUFWriter) -> None:
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts += ["▁", "t", "i", "d", "e", "ti", "de", "tide", "▁tide", "▁t", "id"]
    texts += [f"▁word{i}" for i in range(VOCABULARY - len(texts))]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    kinds += [gguf.TokenType.NORMAL] * (VOCABULARY - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores([float(-i) for i in range(VOCABULARY)])
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _add_byte_pairs(writer: gguf.GGUFWriter, before: str) -> None:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(byte) for byte in printable] + [
        chr(256 + i) for i in range(256 - len(printable))
    ]
    texts = ["<unk>", "<s>", "</s>", *letters]
    texts += dict.fromkeys(merge.replace(" ", "") for merge in MERGES)
    texts += [f"<spare{i}>" for i in range(VOCABULARY - len(texts))]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2]
    kinds += [gguf.TokenType.NORMAL] * (VOCABULARY - len(kinds))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(before)
    writer.add_token_list(texts)
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
