"""Weights that are read again for every pass: where they lie in memory, told to the graph hook.

Only the order of reading and the kernel's page cache are relied on: a page that was given back is read from
the file again when a node wants it, so the results are the same bit for bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterable, Iterator, Sequence

from lowtide.memory import pages
from lowtide.memory.file_maps import FileMap
from lowtide.models.errors import LowtideError
from lowtide.models.spec import ModelSpec, WeightSpan

BLOCK_BYTES = 64 << 10
"""Weights that are read in parts (rows of an embedding, slices of the output's matrix) are kept apart in
blocks of so many bytes: no smaller ones, since this is what Linux maps at once (fault-around)."""


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
    """Add the pages that it lies on, as far as they are whole pages of this file."""
    map_end = file_map.address + pages.round_down(file_map.num_bytes)
    return NativeSpan(begin, end, pages.round_down(begin), min(pages.round_up(end), map_end), group)


def keep_spans_apart(spec: ModelSpec, spans: Sequence[NativeSpan], maps: Iterable[FileMap]) -> None:
    """Have no span's pages come with those of another: what was given back would come back with it.

    Neither do those of distant parts of a weight outside of the layers. Raises `LowtideError` where the
    system allows no more areas of memory.
    """
    cuts = {
        cut for span in spans for cut in _cuts(span, spec.weight_groups[span.group].layer is None)
    }
    for file_map in maps:
        begin, end = file_map.address, file_map.address + file_map.num_bytes
        if not pages.keep_apart(sorted({begin, end, *(cut for cut in cuts if begin < cut < end)})):
            raise LowtideError(
                f"{len(cuts)} areas of memory are wanted for {spec.name}'s weights, and the system allows "
                "no more: raise vm.max_map_count, or --memory so that the weights stay resident"
            )


def _cuts(span: NativeSpan, in_blocks: bool) -> Iterator[int]:
    """The page that a span shares with its neighbour is an area of its own."""
    first, last = pages.round_up(span.begin), pages.round_down(span.end)
    yield from (pages.round_down(span.begin), first, last, pages.round_up(span.end))
    if in_blocks:
        yield from range(-(-first // BLOCK_BYTES) * BLOCK_BYTES, last, BLOCK_BYTES)
