"""Headers of repacked GGUF files: copies of a model with matrices in tiles for lowtide's matmul kernels.

A repacked matrix takes as many bytes as before, so the copy has the shapes, types and sizes of its source
and llama.cpp maps it like any other file; only lowtide's kernels know the tiles
(`attention/native/matmul/repack.h`). Keys of the header name the repacked tensors. The bytes themselves are
written by `runtime/backends/kernels/repack.py`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowtide.models.files.fingerprint import samples_digest
from lowtide.models.gguf.header.reader import GgufContents, TensorInfo
from lowtide.models.spec import TILE_ALIGNMENT

LAYOUT = 3
"""The version of the layout and of the choice of matrices; a copy with another version is made again."""
REPACKABLE_TYPES = frozenset(
    "F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4".split()
)
"""The types that have a tiled layout."""

LAYOUT_KEY = "lowtide.packed.layout"
SOURCE_KEY = "lowtide.packed.source"
TENSORS_KEY = "lowtide.packed.tensors"
DIGEST_KEY = "lowtide.packed.digest"
ALIGNMENT_KEY = "general.alignment"
DIGEST_DIGITS = 32

_LAYER_MATRIX = re.compile(
    r"blk\.\d+\.(attn_q|attn_k|attn_v|attn_qkv|attn_output|ffn_gate|ffn_up|ffn_down)\.weight"
)
_OUTPUT, _EMBEDDING = "output.weight", "token_embd.weight"
_UINT32, _STRING = 4, 8


@dataclass(frozen=True, slots=True)
class RepackedHeader:
    """The header of a repacked file, up to its data, and where its tensors lie.

    The digest at `digest_offset` is zeros until the data is known.
    """

    start: bytes
    tensors: tuple[TensorInfo, ...]
    digest_offset: int


def matmul_tensors(tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    """Return the tensors that graphs read with matmuls, including an embedding that is the output matrix too.

    An embedding beside a separate output matrix is left as it is: graphs only look up its rows.
    """
    has_output = any(tensor.name == _OUTPUT for tensor in tensors)
    return [
        tensor
        for tensor in tensors
        if tensor.type_name in REPACKABLE_TYPES
        and len(tensor.shape) == 2
        and (
            _LAYER_MATRIX.fullmatch(tensor.name)
            or tensor.name == (_OUTPUT if has_output else _EMBEDDING)
        )
    ]


def repacked_header(
    source: GgufContents, repacked: Sequence[TensorInfo], source_fingerprint: str
) -> RepackedHeader:
    """Lay out the header of a repacked file: the source's keys, lowtide's, and the tensors in their order.

    `source_fingerprint` is the `file_fingerprint` of the source. Raises `ValueError` where the source's
    alignment does not suit the kernels.
    """
    own_alignment = source.metadata.get(ALIGNMENT_KEY)
    if own_alignment is not None and (not isinstance(own_alignment, int) or own_alignment % 4):
        raise ValueError(f"its alignment is {own_alignment}; it must be a multiple of 4")
    alignment = TILE_ALIGNMENT if own_alignment is None else own_alignment
    keys = [
        (LAYOUT_KEY, struct.pack("<II", _UINT32, LAYOUT)),
        (SOURCE_KEY, _string_value(source_fingerprint)),
        (TENSORS_KEY, _string_value("\n".join(tensor.name for tensor in repacked))),
    ]
    if own_alignment is None:
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
        tensors.append(replace(tensor, offset=offset))
        offset = _aligned(offset + tensor.num_bytes, alignment)
    start += b"".join(map(_entry, tensors))
    return RepackedHeader(
        start.ljust(_aligned(len(start), alignment), b"\0"), tuple(tensors), digest_offset
    )


def repacked_names(contents: GgufContents) -> tuple[str, ...]:
    """Return the names of a file's repacked tensors; none where it is an ordinary file."""
    names = contents.metadata.get(TENSORS_KEY)
    return tuple(names.split("\n")) if isinstance(names, str) and names else ()


def is_valid(contents: GgufContents, source_fingerprint: str) -> bool:
    """Whether a repacked file has this layout, comes from that source, and is complete."""
    expected = {LAYOUT_KEY: LAYOUT, SOURCE_KEY: source_fingerprint}
    return all(contents.metadata.get(key) == value for key, value in expected.items()) and (
        contents.metadata.get(DIGEST_KEY) == data_digest(contents.path, contents.data_start)
    )


def data_digest(path: Path, data_start: int) -> str:
    """Return the digest of a file's data, `DIGEST_DIGITS` hexadecimal digits."""
    return samples_digest([(path, data_start)])


def _entry(tensor: TensorInfo) -> bytes:
    shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
    return _string(tensor.name) + shape + struct.pack("<IQ", tensor.type_number, tensor.offset)


def _string_value(text: str) -> bytes:
    return struct.pack("<I", _STRING) + _string(text)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _aligned(num_bytes: int, alignment: int) -> int:
    return -(-num_bytes // alignment) * alignment
