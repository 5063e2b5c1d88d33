"""Write small encoders and encoder-decoders of random weights as GGUF files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

Changed = Callable[[str, np.ndarray], np.ndarray]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?!'"


class _Writer:
    """A GGUF file with random matrices of `width`."""

    def __init__(
        self,
        path: Path,
        architecture: str,
        numbers: dict[str, object],
        seed: int = 5,
        changed: Changed = lambda _name, values: values,
    ) -> None:
        self._changed = changed
        self.gguf = gguf.GGUFWriter(path, architecture)
        self.gguf.add_name(path.stem)
        self._random = np.random.default_rng(seed)
        for name, value in numbers.items():
            key = f"{architecture}.{name}"
            if isinstance(value, bool):
                self.gguf.add_bool(key, value)
            elif isinstance(value, int):
                self.gguf.add_uint32(key, value)
            elif isinstance(value, float):
                self.gguf.add_float32(key, value)

    def matrix(self, name: str, rows: int, columns: int) -> None:
        values = self._random.standard_normal((rows, columns)) / np.sqrt(columns)
        self._add(f"{name}.weight", values.astype(np.float32))

    def norm(self, name: str, width: int, *, bias: bool = False) -> None:
        self._add(f"{name}.weight", np.ones(width, np.float32))
        if bias:
            self.bias(name, width)

    def bias(self, name: str, width: int) -> None:
        self._add(f"{name}.bias", np.zeros(width, np.float32))

    def _add(self, name: str, values: np.ndarray) -> None:
        self.gguf.add_tensor(name, self._changed(name, values))

    def close(self) -> None:
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()


def write_encoder(
    path: Path,
    *,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    vocabulary: int = 320,
    context: int = 512,
    pooling: int | None = 2,
    causal: bool | None = False,
    changed: Changed = lambda _name, values: values,
) -> Path:
    """Write a BERT: `pooling` is llama.cpp's number (1 mean, 2 cls); None leaves a key out.

    `changed` gets each tensor's name and values, and returns those to write.
    """
    forward = 2 * width
    numbers = {
        "block_count": layers,
        "embedding_length": width,
        "feed_forward_length": forward,
        "attention.head_count": heads,
        "context_length": context,
        "attention.layer_norm_epsilon": 1e-12,
        "attention.causal": causal,
        "pooling_type": pooling,
    }
    writer = _Writer(path, "bert", numbers, changed=changed)
    _add_word_pieces(writer.gguf, vocabulary)
    writer.matrix("token_embd", vocabulary, width)
    writer.matrix("token_types", 2, width)
    writer.matrix("position_embd", context, width)
    writer.norm("token_embd_norm", width, bias=True)
    for layer in range(layers):
        shapes = {
            **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (width, width)),
            "ffn_up": (forward, width),
            "ffn_down": (width, forward),
        }
        for name, (rows, columns) in shapes.items():
            writer.matrix(f"blk.{layer}.{name}", rows, columns)
            writer.bias(f"blk.{layer}.{name}", rows)
        for name in ("attn_output_norm", "layer_output_norm"):
            writer.norm(f"blk.{layer}.{name}", width, bias=True)
    writer.close()
    return path


def _add_word_pieces(writer: gguf.GGUFWriter, vocabulary: int) -> None:
    texts = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"▁{c}" for c in LETTERS), *LETTERS]
    texts += [f"▁word{i}" for i in range(vocabulary - len(texts))]
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")
    writer.add_token_list(texts)
    writer.add_token_types([3] * 5 + [1] * (len(texts) - 5))
    writer.add_token_type_count(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    writer.add_sep_token_id(3)
    writer.add_mask_token_id(4)


def write_t5(
    path: Path, *, decoder: bool = True, layers: int = 2, width: int = 64, heads: int = 4
) -> Path:
    """Write a T5, or its encoder alone."""
    architecture = "t5" if decoder else "t5encoder"
    forward, vocabulary = 2 * width, 320
    numbers = {
        "block_count": layers,
        "embedding_length": width,
        "feed_forward_length": forward,
        "attention.head_count": heads,
        "attention.key_length": width // heads,
        "attention.value_length": width // heads,
        "context_length": 512,
        "attention.layer_norm_epsilon": 1e-6,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.relative_buckets_count": 32,
        "decoder_start_token_id": 0,
    }
    writer = _Writer(path, architecture, numbers)
    texts = ["<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts += [f"▁word{i}" for i in range(vocabulary - len(texts))]
    writer.gguf.add_tokenizer_model("t5")
    writer.gguf.add_token_list(texts)
    writer.gguf.add_token_scores([float(-i) for i in range(vocabulary)])
    writer.gguf.add_token_types([3, 3, 2] + [6] * 256 + [1] * (vocabulary - 259))
    writer.gguf.add_pad_token_id(0)
    writer.gguf.add_eos_token_id(1)
    writer.gguf.add_unk_token_id(2)
    writer.matrix("token_embd", vocabulary, width)
    for stack in ("enc", "dec") if decoder else ("enc",):
        writer.norm(f"{stack}.output_norm", width)
        for layer in range(layers):
            _add_t5_layer(writer, stack, layer, (width, heads, forward))
    writer.close()
    return path


def _add_t5_layer(writer: _Writer, stack: str, layer: int, shape: tuple[int, int, int]) -> None:
    width, heads, forward = shape
    prefix = f"{stack}.blk.{layer}"
    if layer == 0:
        writer.matrix(f"{prefix}.attn_rel_b", 32, heads)
    for attention in ("attn", "cross_attn") if stack == "dec" else ("attn",):
        writer.norm(f"{prefix}.{attention}_norm", width)
        for name in "qkvo":
            writer.matrix(f"{prefix}.{attention}_{name}", width, width)
    writer.norm(f"{prefix}.ffn_norm", width)
    writer.matrix(f"{prefix}.ffn_gate", forward, width)
    writer.matrix(f"{prefix}.ffn_up", forward, width)
    writer.matrix(f"{prefix}.ffn_down", width, forward)
