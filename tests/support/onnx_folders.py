"""Write the files beside a graph: the configuration of onnxruntime-genai or Optimum, and a tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a decoder; heads of `width` / `heads`."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    kv_heads: int = 4
    feed_forward: int = 96
    vocabulary: int = 320
    context: int = 512

    @property
    def head_size(self) -> int:
        return self.width // self.heads


def write_genai_config(folder: Path, shape: Shape, **changes: object) -> None:
    """Write genai_config.json; `changes` replace numbers of the decoder's."""
    decoder: dict[str, object] = {
        "filename": "model.onnx",
        "head_size": shape.head_size,
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_hidden_layers": shape.layers,
        "session_options": {},
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        **changes,
    }
    model = {
        "type": "llama",
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
        "context_length": shape.context,
        "vocab_size": shape.vocabulary,
        "decoder": decoder,
    }
    search = {"max_length": shape.context, "past_present_share_buffer": True, "do_sample": False}
    (folder / "genai_config.json").write_text(json.dumps({"model": model, "search": search}))


def write_optimum_config(folder: Path, shape: Shape, **changes: object) -> None:
    """Write config.json as Optimum copies it; `changes` replace values."""
    values = {
        "model_type": "llama",
        "hidden_size": shape.width,
        "intermediate_size": shape.feed_forward,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_hidden_layers": shape.layers,
        "max_position_embeddings": shape.context,
        "vocab_size": shape.vocabulary,
        "bos_token_id": 256,
        "eos_token_id": [257],
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(values))


def write_tokenizer(folder: Path, vocabulary: int, chat_template: str | None) -> None:
    """Write a byte-level BPE of 256 bytes, two control tokens, and words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    more = [AddedToken(f"word{i}", normalized=False) for i in range(vocabulary - 258)]
    tokenizer.add_tokens(more)
    tokenizer.save(str(folder / "tokenizer.json"))
    texts: dict[str, str] = {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    if chat_template is not None:
        texts["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(texts))
