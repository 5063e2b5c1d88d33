"""ScoreRule: how the rows and heads of a layer become one score a key. Knows no prompt and no model."""

from __future__ import annotations

import ctypes


class ScoreRule(ctypes.Structure):
    """The C++ `ScoreRule`, field for field.

    The last `num_rows` rows of a prompt count. `use_softmax` takes what a key weighs in a head's softmax,
    and else the raw score; `use_maximum` the largest over rows and heads, and else the sum.
    """

    _fields_ = [
        ("num_rows", ctypes.c_int32),
        ("use_softmax", ctypes.c_int32),
        ("use_maximum", ctypes.c_int32),
    ]
