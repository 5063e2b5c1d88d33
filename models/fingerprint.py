"""Fingerprints: of a model, the same for every quantisation and another for another training; of its files.

A model's are names and shapes of all tensors, and the data of the output norm: every quantisation keeps
that in F32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from lowtide.models.gguf.reader import GgufContents, TensorInfo

NORM = "output_norm.weight"
NUM_SAMPLES = 512
SAMPLE_BYTES = 4096


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


def file_fingerprint(paths: Sequence[Path]) -> str:
    """Return 32 hexadecimal digits for these very files."""
    return samples_digest([(path, 0) for path in paths])


def samples_digest(files: Sequence[tuple[Path, int]]) -> str:
    """Return 32 hexadecimal digits for files from a byte of theirs on: sizes, and samples up to the end.

    Reading all of it would take seconds for a large model; other weights differ in every sample of theirs.
    """
    digest = hashlib.sha256()
    for path, begin in files:
        num_bytes = path.stat().st_size - begin
        digest.update(f"{num_bytes}\n".encode())
        step = max(num_bytes // NUM_SAMPLES, SAMPLE_BYTES)
        with path.open("rb", buffering=0) as file:
            for offset in range(0, num_bytes, step):
                file.seek(begin + offset)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def _data(tensor: TensorInfo, part: GgufContents) -> bytes:
    with part.path.open("rb") as file:
        file.seek(part.data_start + tensor.offset)
        return file.read(tensor.num_bytes)
