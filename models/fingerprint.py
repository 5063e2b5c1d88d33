"""A model's fingerprint: the same for every quantisation of it, another for another training.

Names and shapes of all tensors, and the data of the output norm: every quantisation keeps that in F32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from lowtide.models.gguf_reader import GgufContents, TensorInfo

NORM = "output_norm.weight"


def fingerprint(parts: Sequence[GgufContents]) -> str:
    """Return 32 hexadecimal digits for the model in these files."""
    digest = hashlib.sha256()
    tensors = [(tensor, part) for part in parts for tensor in part.tensors]
    for tensor, _ in sorted(tensors, key=lambda pair: pair[0].name):
        digest.update(f"{tensor.name} {tensor.shape}\n".encode())
    for tensor, part in tensors:
        if tensor.name == NORM and tensor.type_name == "F32":
            digest.update(_data(tensor, part))
    return digest.hexdigest()[:32]


def _data(tensor: TensorInfo, part: GgufContents) -> bytes:
    with part.path.open("rb") as file:
        file.seek(part.data_start + tensor.offset)
        return file.read(tensor.num_bytes)
