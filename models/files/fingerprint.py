"""Fingerprints of files: 32 hexadecimal digits from samples of their bytes.

The fingerprint of a model, which is the same for all its quantisations, is in `models/gguf/header/spec.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

DIGITS = 32
NUM_SAMPLES = 512
SAMPLE_BYTES = 4096


def file_fingerprint(paths: Sequence[Path]) -> str:
    """Return the fingerprint of exactly these files."""
    return samples_digest([(path, 0) for path in paths])


def samples_digest(files: Sequence[tuple[Path, int]]) -> str:
    """Return a digest of files, each from a byte offset on: their sizes, and samples up to the end.

    Reading all of a large model would take seconds; other weights differ in every sample.
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
    return digest.hexdigest()[:DIGITS]
