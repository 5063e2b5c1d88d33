"""Write vocabularies of every kind that llama.cpp has, and open their tokenizers without any weights."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import gguf

from lowtide.attention.bindings.tokenize import install_guarded_tokenizer
from lowtide.models.gguf.llama_cpp import llama_library
from lowtide.models.gguf.text.tokenizer import GgufTokenizer

CONTROL = ("<|im_start|>", "<|im_end|>", "<|im|>")
MERGES = (
    "1 2",
    "3 4",
    "Ġ t",
    "Ġ i",
    "t i",
    "ti d",
    "tid e",
    "A A",
    "AA AA",
    "Ġ Ġ",
    "ĠĠ ĠĠ",
    "Ċ Ċ",
    "- -",
)
NORMAL, UNKNOWN, CONTROL_TYPE, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
KINDS = ("llama", "gpt2", "bert", "t5", "rwkv")
"""The kinds of vocabularies, by llama.cpp's name: SentencePiece, byte pairs, word pieces, unigrams and RWKV's."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[GgufTokenizer]:
    """Yield the tokenizer of a GGUF file, guarded as the runtime guards it; no weights are read."""
    library = llama_library()
    install_guarded_tokenizer()
    params = library.api.llama_model_default_params()
    params.vocab_only = True
    model = library.api.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise ValueError(f"llama.cpp refuses {path}")
    try:
        yield GgufTokenizer(library, library.api.llama_model_get_vocab(model))
    finally:
        library.api.llama_model_free(model)


def write_vocabulary(
    path: Path,
    kind: str = "gpt2",
    *,
    pre: str = "gpt-2",
    control: Sequence[str] = CONTROL,
    user_defined: Sequence[str] = (),
    words: Sequence[str] = (),
    name: str = "tiny",
    add_space_prefix: bool | None = None,
    with_bytes: bool = True,
    merges: Sequence[str] = MERGES,
) -> Path:
    """Write a vocabulary-only file of that kind; `words` are normal tokens of one's own."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    for key, number in {
        "block_count": 1,
        "embedding_length": 64,
        "feed_forward_length": 64,
        "attention.head_count": 1,
        "context_length": 1024,
        "rope.dimension_count": 64,
    }.items():
        writer.add_uint32(f"llama.{key}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    texts, kinds = _first_tokens(kind, with_bytes, merges)
    texts += [*control, *user_defined, *words]
    kinds += [CONTROL_TYPE] * len(control) + [USER_DEFINED] * len(user_defined)
    kinds += [NORMAL] * len(words)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    if kind == "gpt2":
        writer.add_token_merges(list(merges))
    else:
        writer.add_token_scores([-float(i) / 100 for i in range(len(texts))])
    if add_space_prefix is not None:
        writer.add_add_space_prefix(add_space_prefix)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if kind == "bert":
        writer.add_sep_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _first_tokens(
    kind: str, with_bytes: bool, merges: Sequence[str]
) -> tuple[list[str], list[int]]:
    texts, kinds = ["<unk>", "<s>", "</s>"], [UNKNOWN, CONTROL_TYPE, CONTROL_TYPE]
    if kind == "gpt2":
        own = [*_byte_letters(), *(merge.replace(" ", "") for merge in merges)]
    elif kind == "rwkv":
        own = [f"\\x{byte:02x}" for byte in range(256)] + ["ti", "tide", " tide"]
    else:
        if with_bytes and kind != "bert":
            texts += [f"<0x{byte:02X}>" for byte in range(256)]
            kinds += [BYTE] * 256
        letters = [chr(code) for code in range(0x21, 0x7F)]
        own = ["▁", "▁▁", "ti", "de", "tide", "▁tide", "▁t", "AA", *letters, "é", "中"]
        if kind == "bert":
            own += [f"▁{letter}" for letter in letters]
    own = list(dict.fromkeys(own))
    return texts + own, kinds + [NORMAL] * len(own)


def _byte_letters() -> list[str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def pre_tokenizer_candidates() -> list[str]:
    """Return the texts in llama.cpp's library that may name a pre-tokenizer; the linker may merge some others."""
    library = llama_library()._loaded.file.path.read_bytes()
    names = {
        name.decode() for name in re.findall(rb"(?<=\0)[a-z0-9][a-zA-Z0-9._-]{1,30}(?=\0)", library)
    }
    merged = {name[i:] for name in names for i in range(1, len(name) - 2)}
    return sorted(names) + sorted({"glm4", "qwen2", "tekken"} & merged - names)
