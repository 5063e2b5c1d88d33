"""The name that a GGUF file states for its mixture of tensor types, such as Q4_K_M."""

from __future__ import annotations

from collections.abc import Collection

FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
    39: "NVFP4",
    40: "Q1_0",
}
"""By general.file_type (llama.cpp's `llama_ftype`)."""


def file_type_name(number: object, tensor_types: Collection[str]) -> str | None:
    """Return the name that `number` states; None where it states none, or none of the tensors has such a type.

    A file that was requantised may still state the type of its source.
    """
    if isinstance(number, bool) or not isinstance(number, int):
        return None
    name = FILE_TYPES.get(number)
    if name is None:
        return None
    family = "_".join(name.split("_")[:2]) if name[0] in "QT" else name[:3]
    return name if any(kind.startswith(family) for kind in tensor_types) else None
