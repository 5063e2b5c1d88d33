"""Libraries with other structs than lowtide declares, and the declarations beside llama-cpp-python's own."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from fake_llama import BATCH, default_bytes, write_library
from gguf_files import write_model
from llama_bindings import llama_bindings
from processes import run_lowtide

from lowtide.models.errors import ModelError
from lowtide.models.gguf.binding import declarations
from lowtide.models.gguf.binding.declarations import (
    FUNCTIONS,
    CApi,
    llama_batch,
    llama_context_params,
    llama_model_params,
)
from lowtide.models.gguf.binding.find import LibraryFile
from lowtide.models.gguf.binding.layout import check_layout
from lowtide.models.gguf.binding.loaded import LoadedLibrary

STRUCTS = (llama_model_params, llama_context_params, llama_batch)
CONTEXT = default_bytes(llama_context_params)
EMBEDDINGS = llama_context_params.embeddings.offset
MODEL = default_bytes(llama_model_params)


def check(path: Path) -> None:
    loaded = LoadedLibrary(LibraryFile(path, "a library", ""))
    check_layout(CApi(loaded.address), loaded.address, str(loaded.file))


def kind(ctype: Any) -> Any:
    """Return what the C side sees of an argument or a result."""
    if ctype is None or issubclass(ctype, ctypes.Structure):
        return ctype and (ctype.__name__, ctypes.sizeof(ctype))
    if ctypes.sizeof(ctype) == 8 and not hasattr(ctype, "_type_"):
        return "pointer"  # a function
    if not isinstance(ctype._type_, str) or ctype._type_ in "zP":
        return "pointer"
    return ctype._type_


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda s: s.__name__)
def test_structs_are_llama_cpp_pythons(struct: type[ctypes.Structure]) -> None:
    theirs = getattr(llama_bindings(), struct.__name__)
    assert ctypes.sizeof(struct) == ctypes.sizeof(theirs)
    for (name, *_), (their_name, *_) in zip(struct._fields_, theirs._fields_, strict=True):
        ours, reference = getattr(struct, name), getattr(theirs, their_name)
        assert (name, ours.offset, ours.size) == (their_name, reference.offset, reference.size)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_llama_cpp_pythons(name: str) -> None:
    theirs = getattr(llama_bindings(), name)
    result, arguments = FUNCTIONS[name]
    assert kind(result) == kind(theirs.restype)
    assert [kind(a) for a in arguments] == [kind(a) for a in theirs.argtypes]


def test_constants_are_llama_cpp_pythons() -> None:
    for name in ("LLAMA_STATE_SEQ_MAGIC", "LLAMA_STATE_SEQ_VERSION"):
        assert getattr(CApi, name) == getattr(llama_bindings(), name)


def test_the_declared_structs_are_accepted(tmp_path: Path) -> None:
    check(write_library(tmp_path / "libllama.so"))


@pytest.mark.parametrize("field", [f[0] for f in llama_context_params._fields_])
def test_a_pointer_more_in_the_context_parameters_is_refused(field: str, tmp_path: Path) -> None:
    """The next version has one behind `abort_callback_data`; it is refused wherever it is."""
    at = getattr(llama_context_params, field).offset // 8 * 8
    library = write_library(
        tmp_path / "libllama.so", context=CONTEXT[:at] + bytes(8) + CONTEXT[at:]
    )
    with pytest.raises(
        ModelError, match=r"a library has another llama\.cpp .*llama_context_params"
    ):
        check(library)


@pytest.mark.parametrize(
    "parameters",
    [
        {"context": CONTEXT + bytes(8)},
        {"context": CONTEXT[:-8]},
        {"context": CONTEXT[:EMBEDDINGS] + bytes(8) + CONTEXT[EMBEDDINGS:-8]},
        {"model": MODEL[:16] + bytes(4) + MODEL[16:-4]},
        {"model": MODEL + bytes(8)},
        {"context": CONTEXT.replace((512).to_bytes(4, "little"), (256).to_bytes(4, "little"))},
        {"batch": BATCH.replace("{0, &b, 0", "{0, 0, &b")},
        {
            "batch": BATCH.replace("int n_tokens;", "int n_tokens; int more[3];").replace(
                "{0,", "{0, {0},"
            )
        },
        {"without": "llama_memory_seq_cp"},
    ],
    ids=[
        "longer",
        "shorter",
        "same-size",
        "model-shifted",
        "model-longer",
        "value",
        "batch",
        "batch-shifted",
        "function",
    ],
)
def test_another_library_is_refused(parameters: dict[str, Any], tmp_path: Path) -> None:
    library = write_library(tmp_path / "libllama.so", **parameters)
    with pytest.raises(ModelError, match=declarations.VERSION) as caught:
        check(library)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", [("run", "-p", "Hello"), ("plan",)])
def test_commands_refuse_the_next_version(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shifted = CONTEXT[:EMBEDDINGS] + bytes(8) + CONTEXT[EMBEDDINGS:]
    write_library(tmp_path / "libllama.so", context=shifted)
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    done = run_lowtide(*command, "-m", str(write_model(tmp_path / "random.gguf")))
    assert done.code == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "another llama.cpp than lowtide calls" in done.stderr
