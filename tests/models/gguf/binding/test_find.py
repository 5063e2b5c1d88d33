"""Which library of llama.cpp is taken, with made-up packages, and how plug-ins are loaded."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
from fake_llama import PLUGIN, WITH_PLUGINS, compile_library, write_library
from processes import run_lowtide

from lowtide.models.errors import ModelError
from lowtide.models.gguf.binding import find
from lowtide.models.gguf.binding.declarations import VERSION
from lowtide.models.gguf.binding.find import XLLAMACPP_VERSION, LibraryFile, find_library
from lowtide.models.gguf.binding.loaded import LoadedLibrary
from lowtide.models.gguf.llama_cpp import LlamaLibrary

NAME = find.library_names()[0]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of packages in place of the installed ones."""
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "_Editable" not in repr(f)])
    return tmp_path


def package(site: Path, name: str, version: str, library: str | None) -> Path:
    """Make a package, named as its distribution but for llama-cpp-python."""
    distribution = {"llama_cpp": "llama_cpp_python"}.get(name, name)
    folder = site / name
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('a library is found without an import')")
    (site / f"{distribution}-{version}.dist-info").mkdir()
    if library is not None:
        (folder / library).parent.mkdir(exist_ok=True)
        (folder / library).write_bytes(b"")
    return folder


def test_the_first_place_that_has_a_library_wins(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ModelError, match=r"no library of it is installed: pip install 'lowtide\[pre"
    ):
        find_library()
    package(site, "xllamacpp", XLLAMACPP_VERSION, "xllamacpp.abi3.so")
    assert str(find_library()) == f"xllamacpp {XLLAMACPP_VERSION}"
    package(site, "llama_cpp", "0.3.36", f"lib/{NAME}")
    assert str(find_library()) == "llama-cpp-python 0.3.36"
    folder = package(site, "lowtide_llama", "0.3.36", f"lib/{NAME}") / "lib"
    found = find_library()
    assert (str(found), found.plugin_folders) == ("lowtide-llama 0.3.36", (folder,))
    for value in (folder, folder / NAME):
        monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(value))
        assert find_library().path == folder / NAME and find_library().version == ""


def test_packages_without_a_library_are_passed_over(site: Path) -> None:
    package(site, "llama_cpp", VERSION, None)  # installed without compiling
    package(site, "lowtide_llama", VERSION, None)
    package(site, "xllamacpp", XLLAMACPP_VERSION, "xllamacpp.abi3.so")
    assert find_library().package == "xllamacpp"


def test_another_version_of_xllamacpp_is_refused(site: Path) -> None:
    package(site, "xllamacpp", "2026.10.11549", "xllamacpp.abi3.so")
    with pytest.raises(ModelError, match=f"pip install xllamacpp=={XLLAMACPP_VERSION}"):
        find_library()


def test_xllamacpp_is_refused_on_a_processor_that_it_does_not_run_on(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(site, "xllamacpp", XLLAMACPP_VERSION, "xllamacpp.abi3.so")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    old = {"AVX2": False, "F16C": True, "FMA3": False}
    monkeypatch.setattr("lowtide.models.gguf.binding.processor._cpu_features", lambda: old)
    with pytest.raises(ModelError, match=r"needs a processor with AVX2, FMA3, .*lowtide\[native\]"):
        find_library()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert find_library().package == "xllamacpp"


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_without_a_library_is_an_error(
    made: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "nothing"
    if made:
        folder.mkdir()
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(folder))
    done = run_lowtide("run", "-p", "Hello")
    assert (done.code, done.stderr.count("\n")) == (2, 1)
    assert f"LLAMA_CPP_LIB_PATH is {folder}, but there is no {NAME}" in done.stderr


def test_a_file_that_is_no_library_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NAME).write_bytes(b"no library")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    done = run_lowtide("run", "-p", "Hello")
    assert (done.code, done.stderr.count("\n")) == (2, 1) and "does not load" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the plug-in's name is Linux's")
def test_functions_are_found_in_the_plug_in_that_was_loaded(tmp_path: Path) -> None:
    library = write_library(tmp_path / "libllama.so", rest=WITH_PLUGINS)
    plugin = compile_library(tmp_path / "libggml-cpu-test.so", PLUGIN)
    loaded = LoadedLibrary(LibraryFile(library, "a library", "", (tmp_path,)))
    assert loaded.variant is None
    LlamaLibrary(loaded)
    assert loaded.variant == "test"
    number = ctypes.CFUNCTYPE(ctypes.c_int)(loaded.address("ggml_get_type_traits_cpu"))
    assert number() == 7
    assert loaded.processor_code() == (loaded.address("ggml_get_type_traits_cpu"), None)
    plugin.unlink()


def test_the_processors_code_is_found_in_a_library_that_holds_everything(tmp_path: Path) -> None:
    code = ("ggml_vec_dot_f32", "ggml_get_type_traits_cpu", "llamafile_sgemm")
    functions = "\n".join(f"int {name}(void) {{ return 1; }}" for name in code)
    path = write_library(tmp_path / find.library_names()[0], rest=functions)
    loaded = LoadedLibrary(LibraryFile(path, "a library", ""))
    addresses = [loaded.address(name) for name in code]
    assert loaded.processor_code() == (min(addresses), max(addresses))


@pytest.mark.skipif(sys.platform != "linux", reason="the plug-in's name is Linux's")
def test_a_library_without_a_plug_in_for_this_processor_is_refused(tmp_path: Path) -> None:
    library = write_library(tmp_path / "libllama.so", rest=WITH_PLUGINS)
    loaded = LoadedLibrary(LibraryFile(library, "a library", "", (tmp_path,)))
    with pytest.raises(ModelError, match=r"none of the processor plug-ins .*lowtide\[native\]"):
        LlamaLibrary(loaded)
