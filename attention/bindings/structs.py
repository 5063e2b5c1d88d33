"""The C structs that policies pass to the kernels, field for field as the C++ declares them."""

from __future__ import annotations

import ctypes


class SelectionRule(ctypes.Structure):
    """TidalDecode's top-k: how many keys a sparse layer attends to (C++ `SelectionRule`).

    A set has `num_keys` keys, or, if that is 0, the share `fraction` of the visible keys. The first
    `num_sink_tokens` and the last `num_recent` keys of each query are always in the set. With at most
    `min_visible` visible keys attention stays dense.
    """

    _fields_ = [
        ("num_keys", ctypes.c_int32),
        ("fraction", ctypes.c_float),
        ("num_sink_tokens", ctypes.c_int32),
        ("num_recent", ctypes.c_int32),
        ("min_visible", ctypes.c_int32),
    ]


class DeltaRowsRule(ctypes.Structure):
    """Delta by whole tokens: which keys are clustered (C++ `DeltaRowsRule`).

    The last `window` keys of each query and the first `num_sink_tokens` keys of the context are never clustered.
    In decoding, a cluster with more than the share `refine` of a head's attention weight is replaced by
    its keys; 0 refines none.
    """

    _fields_ = [
        ("window", ctypes.c_int32),
        ("num_sink_tokens", ctypes.c_int32),
        ("refine", ctypes.c_float),
    ]


class DeltaBlocksRule(ctypes.Structure):
    """Delta by channel blocks: which blocks of keys are merged (C++ `DeltaBlocksRule`).

    The last `window` keys of each query are never merged; behind them, whole pages of 64 keys are. The
    first `num_sink_tokens` keys of the context are stored whole, the others in blocks of `block_size` channels:
    1, 8 or 16. In decoding, a merged key with more than the share `refine` of a head's attention weight is
    replaced by its exact key; 0 refines none.
    """

    _fields_ = [
        ("window", ctypes.c_int32),
        ("num_sink_tokens", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("refine", ctypes.c_float),
    ]


class ScoreCounts(ctypes.Structure):
    """The cost of scores over merged key blocks (C++ `ScoreCounts`); see `bindings.counts.ScoreCost`."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "channels_total channels_merged channels_stored channels_multiplied key_bytes_total "
            "key_bytes_read".split()
        )
    ]


class ScoreRule(ctypes.Structure):
    """GemFilter: how a layer scores the keys of a prompt (C++ `ScoreRule`).

    The queries of the last `num_tokens` tokens count. `use_softmax` takes a key's weight in each head's
    softmax, else the raw q·k score; `use_maximum` takes the largest over queries and heads, else the sum.
    """

    _fields_ = [
        ("num_tokens", ctypes.c_int32),
        ("use_softmax", ctypes.c_int32),
        ("use_maximum", ctypes.c_int32),
    ]
