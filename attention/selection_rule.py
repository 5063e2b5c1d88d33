"""SelectionRule: how many keys a sparse layer attends to. Knows no layer and no model."""

from __future__ import annotations

import ctypes


class SelectionRule(ctypes.Structure):
    """The C++ `SelectionRule`, field for field.

    `num_keys` counts all keys of a set, or is 0 and `fraction` of the visible ones is taken. Each row's
    `num_first` first and `num_last` last keys are always among them. Up to `min_visible` visible keys,
    attention stays dense.
    """

    _fields_ = [
        ("num_keys", ctypes.c_int32),
        ("fraction", ctypes.c_float),
        ("num_first", ctypes.c_int32),
        ("num_last", ctypes.c_int32),
        ("min_visible", ctypes.c_int32),
    ]
