"""Where a file is mapped in this process, as the system tells it. Linux; elsewhere nothing is found."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lowtide.memory import pages

MAPS = Path("/proc/self/maps")


@dataclass(frozen=True, slots=True)
class FileMap:
    """Bytes [offset, offset + num_bytes) of the file lie at `address`."""

    address: int
    num_bytes: int
    offset: int
    is_readable: bool = True


def read_file_maps(path: Path, maps: Path = MAPS) -> frozenset[FileMap]:
    """Return where the file is mapped; one that was mapped twice is there twice."""
    try:
        wanted = os.stat(path)
        lines = maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return frozenset()
    found = (_file_map(line, wanted) for line in lines)
    return frozenset(file_map for file_map in found if file_map is not None)


def give_back(file_map: FileMap) -> None:
    """Let go of the map's pages; what is read of them later comes from the file again.

    Only for a map that is never written to.
    """
    pages.give_back(file_map.address, file_map.num_bytes)


def _file_map(line: str, wanted: os.stat_result) -> FileMap | None:
    """Read one line: address range, permissions, offset, device, inode, path."""
    fields = line.split(maxsplit=5)
    if len(fields) < 5 or int(fields[4]) != wanted.st_ino:
        return None
    major, minor = (int(part, 16) for part in fields[3].split(":"))
    if (major, minor) != (os.major(wanted.st_dev), os.minor(wanted.st_dev)):
        return None
    begin, end = (int(part, 16) for part in fields[0].split("-"))
    return FileMap(begin, end - begin, int(fields[2], 16), is_readable=fields[1].startswith("r"))
