"""Buffer: a block of memory of a loaded model, as llama.cpp reports it while it loads."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_REPORTED = re.compile(
    r"^\w+: +(?P<place>\S+) +(?P<use>model|KV|RS|compute|output) buffer size = +(?P<size>\d+\.\d+) MiB"
)
USES = {"model": "weights", "KV": "KV cache", "RS": "KV cache", "compute": "compute buffer"}
"""llama.cpp's words for what a buffer holds, and the plan's; the output buffer holds logits."""
OUTPUT = "logits and sampling"


@dataclass(frozen=True, slots=True)
class Buffer:
    """`num_bytes` of a device or of main memory; `place` is ggml's name of it, such as "Vulkan0" or "CPU".

    The size is rounded to a hundredth of a MiB, as llama.cpp prints it. `component` is the plan's name for the use.
    """

    place: str
    component: str
    num_bytes: int


def reported_buffers(messages: Iterable[str]) -> tuple[Buffer, ...]:
    """Return the buffers in llama.cpp's messages: the sum of those with the same place and use.

    A compute buffer is reported again each time that it is laid out; the last report counts.
    """
    found: dict[tuple[str, str], int] = {}
    for message in messages:
        match = _REPORTED.match(message)
        if match is None:
            continue
        key = match["place"], USES.get(match["use"], OUTPUT)
        num_bytes = round(float(match["size"]) * (1 << 20))
        found[key] = num_bytes if match["use"] == "compute" else found.get(key, 0) + num_bytes
    return tuple(Buffer(*key, num_bytes) for key, num_bytes in found.items() if num_bytes)


def bytes_on(buffers: Iterable[Buffer], place: str) -> dict[str, int]:
    """Return the bytes of each component on a device."""
    return {one.component: one.num_bytes for one in buffers if one.place == place}
