"""Packed GGUF files: a model's file with its matrices laid out for our kernels, in the same places.

A packed matrix takes as many bytes as before, so such a file has the shapes, types and sizes of the one it
was made from, and llama.cpp maps it like any other; what its matrices mean only our kernels know
(`attention/native/products/packed_matrix.h`). Keys of the header say which they are. Reads and lays out
headers; packs nothing.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowtide.models.fingerprint import samples_digest
from lowtide.models.gguf.reader import TYPE_NUMBERS, GgufContents, TensorInfo

LAYOUT = 2
"""Counts the ways that matrices were laid out in, and which ones: a file of another one is made again."""
PACKED_TYPES = frozenset("F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K".split())
"""The types that have a packed form."""

LAYOUT_KEY = "lowtide.packed.layout"
SOURCE_KEY = "lowtide.packed.source"
TENSORS_KEY = "lowtide.packed.tensors"
DIGEST_KEY = "lowtide.packed.digest"
ALIGNMENT_KEY = "general.alignment"
ALIGNMENT = 64
DIGEST_DIGITS = 32

_LAYER_MATRIX = re.compile(
    r"blk\.\d+\.(attn_q|attn_k|attn_v|attn_qkv|attn_output|ffn_gate|ffn_up|ffn_down)\.weight"
)
_OUTPUT, _EMBEDDING = "output.weight", "token_embd.weight"
_UINT32, _STRING = 4, 8


@dataclass(frozen=True, slots=True)
class PackedHeader:
    """The beginning of a packed file, up to its data, and where its tensors lie.

    `digest_offset` is where the digest stands, of zeros until the data is known.
    """

    start: bytes
    tensors: tuple[TensorInfo, ...]
    digest_offset: int


def matrices(tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    """Return the tensors that graphs read by products alone, and the embedding where it is the output too.

    An embedding beside an output of its own is left as it is: of it only rows are read.
    """
    has_output = any(tensor.name == _OUTPUT for tensor in tensors)
    return [
        tensor
        for tensor in tensors
        if tensor.type_name in PACKED_TYPES
        and len(tensor.shape) == 2
        and (
            _LAYER_MATRIX.fullmatch(tensor.name)
            or tensor.name == (_OUTPUT if has_output else _EMBEDDING)
        )
    ]


def repacked_header(
    source: GgufContents, packed: Sequence[TensorInfo], component: str
) -> PackedHeader:
    """Lay the header of a packed file out: the source's own keys, ours, and its tensors in their order.

    `component` is the fingerprint of the files that it was made from. Raises `ValueError` where the source's
    alignment does not suit our kernels.
    """
    stated = source.metadata.get(ALIGNMENT_KEY)
    if stated is not None and (not isinstance(stated, int) or stated % 4):
        raise ValueError(f"its alignment is {stated}, a multiple of 4 is wanted")
    alignment = ALIGNMENT if stated is None else stated
    keys = [
        (LAYOUT_KEY, struct.pack("<II", _UINT32, LAYOUT)),
        (SOURCE_KEY, _string_value(component)),
        (TENSORS_KEY, _string_value("\n".join(tensor.name for tensor in packed))),
    ]
    if stated is None:
        keys.append((ALIGNMENT_KEY, struct.pack("<II", _UINT32, alignment)))
    keys.append((DIGEST_KEY, _string_value("0" * DIGEST_DIGITS)))
    with source.path.open("rb") as file:
        magic_and_version = file.read(8)
        file.seek(24)
        own_keys = file.read(source.metadata_end - 24)
    counts = struct.pack("<QQ", len(source.tensors), source.num_keys + len(keys))
    start = magic_and_version + counts + own_keys
    start += b"".join(_string(key) + value for key, value in keys)
    digest_offset = len(start) - DIGEST_DIGITS
    tensors, offset = [], 0
    for tensor in source.tensors:
        tensors.append(
            TensorInfo(tensor.name, tensor.shape, tensor.type_name, tensor.num_bytes, offset)
        )
        offset = _aligned(offset + tensor.num_bytes, alignment)
    start += b"".join(map(_entry, tensors))
    return PackedHeader(
        start.ljust(_aligned(len(start), alignment), b"\0"), tuple(tensors), digest_offset
    )


def repacked_names(contents: GgufContents) -> tuple[str, ...]:
    """Return the names of a file's packed tensors; none where it is like any other."""
    names = contents.metadata.get(TENSORS_KEY)
    return tuple(names.split("\n")) if isinstance(names, str) and names else ()


def is_valid(contents: GgufContents, component: str) -> bool:
    """Whether a packed file is of this layout, of the files of that fingerprint, and as it was written."""
    wanted = {LAYOUT_KEY: LAYOUT, SOURCE_KEY: component}
    return all(contents.metadata.get(key) == value for key, value in wanted.items()) and (
        contents.metadata.get(DIGEST_KEY) == data_digest(contents.path, contents.data_start)
    )


def data_digest(path: Path, data_start: int) -> str:
    """Return the digest of a file's data, `DIGEST_DIGITS` long."""
    return samples_digest([(path, data_start)])


def _entry(tensor: TensorInfo) -> bytes:
    shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
    return (
        _string(tensor.name)
        + shape
        + struct.pack("<IQ", TYPE_NUMBERS[tensor.type_name], tensor.offset)
    )


def _string_value(text: str) -> bytes:
    return struct.pack("<I", _STRING) + _string(text)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _aligned(num_bytes: int, alignment: int) -> int:
    return -(-num_bytes // alignment) * alignment
