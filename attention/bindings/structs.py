"""Our attention kernels called on arrays, outside any graph: what tests and measurements use.

Knows no model. Inside a graph the same kernels are called by `llama_hook`.

Attention over groups called on arrays, outside any graph: what tests and measurements use.

Attention over states called on arrays, outside any graph: what tests and measurements use.

SelectionRule: how many keys a sparse layer attends to. Knows no layer and no model.

ScoreRule: how the rows and heads of a layer become one score a key. Knows no prompt and no model."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowtide.attention.bindings.library import native_library
from lowtide.models.errors import BadOption, LowtideError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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


KERNEL_SETS = ("avx512", "avx2", "neon", "portable")
KV_TYPES = {"f16": 0, "q8_0": 1, "q4_0": 2, "f32": 3}


class _Problem(ctypes.Structure):
    """The C++ `AttentionProblem`, field for field."""

    _fields_ = [
        ("q", ctypes.c_void_p),
        ("q_row_stride", ctypes.c_size_t),
        ("q_head_stride", ctypes.c_size_t),
        ("k", ctypes.c_void_p),
        ("k_key_stride", ctypes.c_size_t),
        ("k_head_stride", ctypes.c_size_t),
        ("v", ctypes.c_void_p),
        ("v_key_stride", ctypes.c_size_t),
        ("v_head_stride", ctypes.c_size_t),
        ("mask", ctypes.c_void_p),
        ("mask_row_stride", ctypes.c_size_t),
        ("out", ctypes.c_void_p),
        ("out_row_stride", ctypes.c_size_t),
        ("out_head_stride", ctypes.c_size_t),
        ("k_type", ctypes.c_int),
        ("v_type", ctypes.c_int),
        ("num_rows", ctypes.c_int),
        ("num_heads", ctypes.c_int),
        ("num_kv_heads", ctypes.c_int),
        ("num_keys", ctypes.c_int),
        ("head_dim", ctypes.c_int),
        ("value_dim", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("sinks", ctypes.c_void_p),
        ("selected", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("totals", ctypes.c_void_p),
        ("first_scored_row", ctypes.c_int),
        ("scores_stride", ctypes.c_int),
        ("use_bf16", ctypes.c_int),
        ("states", ctypes.c_void_p),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionInputs:
    """One attention node as arrays; last axes are contiguous.

    `q` (rows, heads, head_dim); `k`, `v` (cells, kv_heads, stored row), float16 or the bytes of quantised
    blocks; `mask` (rows, cells), added to the scaled scores. `sinks` (heads,) are scores without values.
    `use_bf16` lets more than 32 rows be multiplied in bfloat16, where the kernels can.
    """

    q: NDArray[np.float32]
    k: NDArray[np.generic]
    v: NDArray[np.generic]
    mask: NDArray[np.float16]
    value_dim: int
    scale: float
    softcap: float = 0.0
    kv_type: str = "f16"
    sinks: NDArray[np.float32] | None = None
    use_bf16: bool = False

    def problem(self, out: NDArray[np.float32], cells: NDArray[np.int32] | None) -> _Problem:
        """Return the C++ struct over these arrays, which must outlive it."""
        num_rows, num_heads, head_dim = self.q.shape
        num_cells, num_kv_heads = self.k.shape[:2]
        return _Problem(
            self.q.ctypes.data, self.q.strides[0], self.q.strides[1],
            self.k.ctypes.data, self.k.strides[0], self.k.strides[1],
            self.v.ctypes.data, self.v.strides[0], self.v.strides[1],
            self.mask.ctypes.data, self.mask.strides[0],
            out.ctypes.data, out.strides[0], out.strides[1],
            KV_TYPES[self.kv_type], KV_TYPES[self.kv_type],
            num_rows, num_heads, num_kv_heads, num_cells if cells is None else len(cells),
            head_dim, self.value_dim, self.scale, self.softcap,
            None if self.sinks is None else self.sinks.ctypes.data,
            None if cells is None else cells.ctypes.data,
            None, None, 0, 0, self.use_bf16, None,
        )  # fmt: skip


def attend(
    inputs: AttentionInputs,
    *,
    cells: NDArray[np.int32] | None = None,
    kernels: str | None = None,
    threads: int = 1,
) -> NDArray[np.float32]:
    """Return exact attention, shape (rows, heads, value_dim), to `cells` (ascending) or to every cell.

    Raises `LowtideError` where this build and processor have no such `kernels`.
    """
    import numpy as np

    out = np.zeros((*inputs.q.shape[:2], inputs.value_dim), np.float32)
    problem = inputs.problem(out, cells)
    failure = native_library().lowtide_attend(ctypes.byref(problem), _name(kernels), threads)
    _check(failure, inputs, kernels)
    return out


def select(
    inputs: AttentionInputs, rule: SelectionRule, *, kernels: str | None = None, threads: int = 1
) -> NDArray[np.int32] | None:
    """Return the cells that a selection layer chooses, ascending; None where attention stays dense."""
    import numpy as np

    out = np.zeros((*inputs.q.shape[:2], inputs.value_dim), np.float32)
    cells, count = np.zeros(len(inputs.k), np.int32), ctypes.c_int32()
    problem = inputs.problem(out, None)
    failure = native_library().lowtide_select(
        ctypes.byref(problem),
        ctypes.byref(rule),
        _name(kernels),
        threads,
        ctypes.c_void_p(cells.ctypes.data),
        ctypes.byref(count),
    )
    _check(failure, inputs, kernels)
    return None if count.value < 0 else cells[: count.value]


def _name(kernels: str | None) -> bytes | None:
    return kernels.encode() if kernels else None


def _check(failure: int, inputs: AttentionInputs, kernels: str | None) -> None:
    if failure == 2:
        raise BadOption(
            f"{inputs.q.shape[1]} heads over {inputs.k.shape[1]} of size {inputs.q.shape[2]} and "
            f"{inputs.value_dim} are no shape of the kernels: whole groups of heads, of a multiple of "
            "16 up to 256, are wanted"
        )
    if failure:
        raise LowtideError(f"this build and processor have no {kernels} kernels")


def usable_kernel_sets() -> tuple[str, ...]:
    """Return the kernel sets that this build and processor have, the best one first."""
    import numpy as np

    one = np.zeros((1, 1, 16), np.float32)
    kv = np.zeros((1, 1, 16), np.float16)
    mask = np.zeros((1, 1), np.float16)
    inputs = AttentionInputs(q=one, k=kv, v=kv, mask=mask, value_dim=16, scale=1.0)
    found = []
    for name in KERNEL_SETS:
        try:
            attend(inputs, kernels=name)
        except LowtideError:
            continue
        found.append(name)
    return tuple(found)


class DeltaRule(ctypes.Structure):
    """The C++ `DeltaRule`, field for field.

    Each row's last `window` keys and the first `num_fixed` of all are never grouped. A group with more than
    the share `refine` of a head's weight is replaced by its keys in decoding; 0: none. `replaces` has a
    layer's own cells given back once groups stand for them, and no group opened.
    """

    _fields_ = [
        ("window", ctypes.c_int32),
        ("num_fixed", ctypes.c_int32),
        ("refine", ctypes.c_float),
        ("replaces", ctypes.c_int32),
    ]


class GroupedLayer:
    """One layer that keeps its groups from pass to pass; close it.

    `num_groups` (kv_heads,) is how many groups each page of 64 keys becomes, `scales` (kv_heads, head_dim)
    what distances between keys are measured with; `score_bias` (kv_heads,) times the mean square of a group's
    distances is added to its scores. Raises `LowtideError` where that cannot be.
    """

    def __init__(
        self,
        rule: DeltaRule,
        num_groups: NDArray[np.uint8],
        score_bias: NDArray[np.float32],
        scales: NDArray[np.float32],
    ) -> None:
        self._library = native_library()
        self._library.lowtide_delta_new.restype = ctypes.c_void_p
        self._layer = self._library.lowtide_delta_new(
            ctypes.byref(rule),
            ctypes.c_void_p(num_groups.ctypes.data),
            ctypes.c_void_p(score_bias.ctypes.data),
            ctypes.c_void_p(scales.ctypes.data),
            *scales.shape,
        )
        if not self._layer:
            raise LowtideError("a page cannot have so many groups, or there is no memory for them")

    def attend(
        self, inputs: AttentionInputs, *, kernels: str | None = None, threads: int = 1
    ) -> tuple[NDArray[np.float32], int]:
        """Attend with the rows of a pass; each sees a beginning of the cache, one cell more than the last.

        Returns the result, (rows, heads, value_dim), and how many keys and groups the last row attended
        to, as a mean of the heads; -1, with a result of zeros, where the mask is of another kind.
        """
        import numpy as np

        out = np.zeros((*inputs.q.shape[:2], inputs.value_dim), np.float32)
        problem, num_read = inputs.problem(out, None), ctypes.c_int()
        name = kernels.encode() if kernels else None
        failure = self._library.lowtide_delta_attend(
            ctypes.c_void_p(self._layer),
            ctypes.byref(problem),
            name,
            threads,
            ctypes.byref(num_read),
        )
        if failure:
            raise LowtideError(
                f"these shapes cannot be attended to with {kernels or 'any'} kernels"
            )
        return out, num_read.value

    def close(self) -> None:
        """Free the layer's groups; closing twice is allowed."""
        if self._layer:
            self._library.lowtide_delta_free(ctypes.c_void_p(self._layer))
            self._layer = None


class StatesRule(ctypes.Structure):
    """The C++ `StatesRule`, field for field.

    Each row sees its last `window` keys as they are, and of those behind them whole pages of 64 as states.
    The first `num_first` keys of all are sent whole; of others blocks of `block` channels, 1, 8 or 16.
    A state with more than the share `refine` of a head's weight is replaced by its key in decoding; 0: none.
    """

    _fields_ = [
        ("window", ctypes.c_int32),
        ("num_first", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("refine", ctypes.c_float),
    ]


class ScoreCounts(ctypes.Structure):
    """The C++ `ScoreCounts`, field for field; of each pass's last row, a channel of a key counted once.

    `channels_held` are all that it sees, `channels_behind` those of states, of which `channels_sent` were
    sent; `channels_multiplied` is what scores really cost, the window and opened keys among it.
    `key_bytes_held` are those of all keys in the cache, `key_bytes_read` of states and the other keys.
    """

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "channels_held channels_behind channels_sent channels_multiplied key_bytes_held "
            "key_bytes_read".split()
        )
    ]


class StatesLayer:
    """One layer that keeps its states from pass to pass; close it.

    `thresholds` (kv_heads,) are how far a block may be off, as multiples of 1 over `scales` (kv_heads,
    head_dim); `shares` (kv_heads,) how much of a page is sent at the most, by a threshold of the page's
    own, 1 where the stated one says. Raises `LowtideError` where that cannot be.
    """

    def __init__(
        self,
        rule: StatesRule,
        thresholds: NDArray[np.float32],
        shares: NDArray[np.float32],
        scales: NDArray[np.float32],
    ) -> None:
        self._library = native_library()
        pointer = ctypes.c_void_p
        self._library.lowtide_states_new.restype = pointer
        self._library.lowtide_states_new.argtypes = [pointer] * 4 + [ctypes.c_int] * 2
        self._library.lowtide_states_attend.argtypes = [
            *(pointer, pointer, ctypes.c_char_p, ctypes.c_int, pointer)
        ]
        self._library.lowtide_states_free.argtypes = [pointer]
        self._library.lowtide_states_free.restype = None
        self._layer = self._library.lowtide_states_new(
            ctypes.byref(rule),
            thresholds.ctypes.data,
            shares.ctypes.data,
            scales.ctypes.data,
            *scales.shape,
        )
        if not self._layer:
            raise LowtideError(
                f"blocks of {rule.block} channels cannot be sent of heads of {scales.shape[1]}: 1, 8 or 16 "
                "of a multiple of 16 up to 256 are wanted, behind a window of 1 or more"
            )
        self.counts = ScoreCounts()

    def attend(
        self, inputs: AttentionInputs, *, kernels: str | None = None, threads: int = 1
    ) -> NDArray[np.float32]:
        """Attend with the rows of a pass; each sees a beginning of the cache, one cell more than the last.

        Returns the result, (rows, heads, value_dim), zeros where the mask is of another kind; `counts` are
        of all passes up to this one.
        """
        import numpy as np

        out = np.zeros((*inputs.q.shape[:2], inputs.value_dim), np.float32)
        problem = inputs.problem(out, None)
        failure = self._library.lowtide_states_attend(
            self._layer,
            ctypes.byref(problem),
            kernels.encode() if kernels else None,
            threads,
            ctypes.byref(self.counts),
        )
        if failure:
            raise LowtideError(
                f"these shapes cannot be attended to with {kernels or 'any'} kernels"
            )
        return out

    def close(self) -> None:
        """Free the layer's states; closing twice is allowed."""
        if self._layer:
            self._library.lowtide_states_free(self._layer)
            self._layer = None


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
