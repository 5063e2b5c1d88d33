"""Weights that are read again for every pass: where they lie in memory, told to the graph hook.

Only the order of reading and the kernel's page cache are relied on: a page that was given back is read from
the file again when a node wants it, so the results are the same bit for bit.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Collection, Iterator, Sequence

from lowtide.memory.file_maps import FileMap
from lowtide.models.errors import LowtideError
from lowtide.models.spec import ModelSpec, WeightSpan

AROUND_BYTES = 64 << 10
"""A page that is read brings its neighbours with it, within an aligned block (Linux's fault-around)."""


class NativeSpan(ctypes.Structure):
    """The C++ `WeightSpan`, field for field."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in "begin end page_begin page_end".split()),
        ("group", ctypes.c_int32),
    ]


def mapped_spans(spec: ModelSpec, maps: Sequence[Collection[FileMap]]) -> list[NativeSpan]:
    """Return where each group of the model's weights lies, in order of address.

    `maps` has one entry for each of the model's files. Raises `LowtideError` where a weight is in no map.
    """
    spans = [
        native
        for group, weights in enumerate(spec.weight_groups)
        for span in weights.spans
        for native in _in_memory(span, maps[span.part], group)
    ]
    found = sum(span.end - span.begin for span in spans)
    wanted = sum(group.num_bytes for group in spec.weight_groups)
    if found != wanted:
        raise LowtideError(
            f"{wanted - found} bytes of {spec.name}'s weights are in no map of its file, so they cannot be "
            "given back between passes: raise --memory so that the weights stay resident"
        )
    return sorted(spans, key=lambda span: int(span.begin))


def _in_memory(span: WeightSpan, maps: Collection[FileMap], group: int) -> Iterator[NativeSpan]:
    for file_map in maps:
        begin = max(span.offset, file_map.offset)
        end = min(span.offset + span.num_bytes, file_map.offset + file_map.num_bytes)
        if begin < end:
            moved = file_map.address - file_map.offset
            yield _with_pages(file_map, begin + moved, end + moved, group)


def _with_pages(file_map: FileMap, begin: int, end: int, group: int) -> NativeSpan:
    """Add the pages around, as far as they are this file's."""
    first = begin // AROUND_BYTES * AROUND_BYTES
    last = -(-end // AROUND_BYTES) * AROUND_BYTES
    map_end = file_map.address + file_map.num_bytes // mmap.PAGESIZE * mmap.PAGESIZE
    return NativeSpan(begin, end, max(first, file_map.address), min(last, map_end), group)
