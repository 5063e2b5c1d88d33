"""Whose code an address is, and reading it in."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from lowtide.memory.file_maps import read_file_maps
from lowtide.memory.loaded_code import library_of, read_in
from lowtide.memory.meter import read_process_memory
from lowtide.memory.pages import give_back
from lowtide.models.llama_library import llama_library

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="Linux tells where files are mapped"
)


def test_an_address_of_no_library_is_nobodys() -> None:
    assert library_of(None) is None
    assert library_of(ctypes.addressof(ctypes.create_string_buffer(8))) is None
    read_in(8)


def test_a_library_that_was_let_go_is_read_in_again() -> None:
    address = llama_library().address("ggml_get_type_traits_cpu")
    library = library_of(address)
    assert library is not None and b"ggml-cpu" in library
    begin = next(
        file_map
        for file_map in read_file_maps(Path(library.decode()))
        if file_map.address <= address < file_map.address + file_map.num_bytes
    )
    assert give_back(begin.address, begin.num_bytes)  # code: never written to
    before = read_process_memory().file_bytes
    read_in(address)
    assert read_process_memory().file_bytes - before >= 0.9 * begin.num_bytes
