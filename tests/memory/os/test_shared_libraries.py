"""Which library an address belongs to, making it resident, and releasing startup pages."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import pytest
from processes import run_python

from lowtide.memory.os.file_mappings import read_file_maps
from lowtide.memory.os.pages import release_pages
from lowtide.memory.os.shared_libraries import _unwritten_areas, fault_in, library_of
from lowtide.memory.process import read_process_memory
from lowtide.models.gguf.llama_cpp import llama_library

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux shows where files are mapped"
)


def test_an_address_outside_of_libraries() -> None:
    assert library_of(None) is None
    assert library_of(ctypes.addressof(ctypes.create_string_buffer(8))) is None
    fault_in(8)


def test_a_released_library_becomes_resident_again() -> None:
    address = llama_library().address("ggml_get_type_traits_cpu")
    library = library_of(address)
    assert library is not None and b"ggml-cpu" in library
    begin = next(
        file_map
        for file_map in read_file_maps(Path(library.decode()))
        if file_map.address <= address < file_map.address + file_map.num_bytes
    )
    assert release_pages(begin.address, begin.num_bytes)  # code: never written to
    before = read_process_memory().file_bytes
    fault_in(address)
    assert read_process_memory().file_bytes - before >= 0.9 * begin.num_bytes


def test_a_part_of_a_library_becomes_resident() -> None:
    address = llama_library().address("llama_decode")
    library = library_of(address)
    assert library is not None
    code = next(
        file_map
        for file_map in read_file_maps(Path(library.decode()))
        if file_map.address <= address < file_map.address + file_map.num_bytes
    )
    assert release_pages(code.address, code.num_bytes)
    before = read_process_memory().file_bytes
    until = min(address + 300_000, code.address + code.num_bytes - 1)
    fault_in(address, until)
    grown = read_process_memory().file_bytes - before
    assert until - address <= grown < 0.8 * code.num_bytes


_RELEASE = """
import hashlib, json
import numpy as np
from lowtide.memory.os.shared_libraries import release_startup_pages
from lowtide.memory.process import read_process_memory
before = read_process_memory()
release_startup_pages()
after = read_process_memory()
results = hashlib.sha256(b"tide").hexdigest(), np.linalg.solve(np.eye(3) * 2, np.ones(3)).tolist()
anonymous_bytes = before.anonymous_bytes - after.anonymous_bytes
print(json.dumps([before.file_bytes - after.file_bytes, anonymous_bytes, results]))
"""
TIDE = "8a28929ac7f9a17e97a421ac2cd63ac73568ebe87bc0cee641a193d91c761577"


def test_startup_pages_are_released_and_the_libraries_work() -> None:
    done = run_python(_RELEASE)
    assert done.code == 0, done.stderr
    file_bytes, anonymous_bytes, results = json.loads(done.stdout)
    # The libraries differ from build to build; but written pages are never lost.
    assert file_bytes >= 0 and abs(anonymous_bytes) < 1 << 18
    assert results == [TIDE, [0.5] * 3]


_MAP_LAZILY = """
import json
import numpy as np
from pathlib import Path
from lowtide.attention.bindings.library import can_map_lazily
from lowtide.memory.os.file_mappings import read_file_maps
from lowtide.memory.process import read_process_memory
from lowtide.memory.os.pages import release_pages
from lowtide.models.gguf.llama_cpp import llama_library
llama_library(), can_map_lazily()
can_map_lazily.cache_clear()
with open("/proc/self/maps") as lines:
    paths = {line.split()[-1] for line in lines if "umath_linalg" in line and "r-xp" in line}
(library,) = paths
first = min(read_file_maps(Path(library)), key=lambda file_map: file_map.address)
released = release_pages(first.address, first.num_bytes)
before = read_process_memory().file_bytes
can_map_lazily()
print(json.dumps([released, read_process_memory().file_bytes - before]))
"""


def test_lazy_mappings_make_no_other_library_resident() -> None:
    """Reading one page would be enough: Linux then maps the whole folio around it."""
    done = run_python(_MAP_LAZILY)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout) == [True, 0]


_SMAPS = b"""\
10000-30000 r--p 00000000 fe:00 11   /usr/lib/libcrypto.so.3
Rss:                 128 kB
Anonymous:             0 kB
30000-50000 r-xp 00020000 fe:00 11   /usr/lib/libcrypto.so.3
Rss:                 128 kB
Anonymous:             4 kB
50000-60000 rw-p 00040000 fe:00 11   /usr/lib/libcrypto.so.3
Anonymous:             0 kB
60000-70000 r-xp 00000000 fe:00 12   /usr/lib/libcryptography/libm.so.6
Anonymous:             0 kB
70000-80000 r-xp 00000000 00:00 0
Anonymous:             0 kB
80000-a0000 r-xp 00000000 fe:00 13   /a b/numpy.libs/libscipy_openblas64_-32a4.so
Anonymous:             0 kB
"""


def test_only_unwritten_areas_are_released(tmp_path: Path) -> None:
    smaps = tmp_path / "smaps"
    smaps.write_bytes(_SMAPS)
    found = list(_unwritten_areas(smaps, (b"libcrypto", b"openblas")))
    assert found == [(0x10000, 0x20000), (0x80000, 0x20000)]
