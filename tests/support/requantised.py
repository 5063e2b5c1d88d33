"""Copies of a model in another quantisation, made by llama.cpp's quantiser."""

from __future__ import annotations

import ctypes
from pathlib import Path

from llama_bindings import llama_bindings

FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "BF16": 32,
}


def requantised(source: Path, target: Path, file_type: str) -> Path:
    """Write `source` again as `file_type`, at `target`."""
    api = llama_bindings()
    params = api.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = FILE_TYPES[file_type], True
    failure = api.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    assert failure == 0, f"llama.cpp does not write {source} as {file_type}"
    return target
