"""Small C libraries with the names of llama.cpp's functions, to be refused or chosen.

Their parameter structs have the declared default values, or are those of a neighbouring version.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from lowtide.models.gguf.binding.declarations import (
    DEFAULTS,
    FUNCTIONS,
    llama_context_params,
    llama_model_params,
)

BATCH = """
typedef struct { int n_tokens; void *token, *embd, *pos, *n_seq_id, *seq_id, *logits; } batch;
batch llama_batch_init(int n, int embd, int n_seq_max) { batch b = {0, &b, 0, &b, &b, &b, &b}; return b; }
"""
WITH_PLUGINS = """
#include <dlfcn.h>
#include <stdio.h>
static void *plugin;
void ggml_backend_load_all_from_path(const char *folder) {
    char path[4096];
    snprintf(path, sizeof path, "%s/libggml-cpu-test.so", folder);
    plugin = dlopen(path, RTLD_NOW);
}
void *ggml_backend_reg_by_name(const char *name) { return plugin; }
void *ggml_backend_reg_get_proc_address(void *reg, const char *name) { return dlsym(reg, name); }
"""
PLUGIN = "int ggml_backend_set_n_threads(void) { return 3; }\nint ggml_get_type_traits_cpu(void) { return 7; }"
LINKED = "int ggml_get_type_traits_cpu(void) { return 1; }"


def default_bytes(struct: type[ctypes.Structure]) -> bytes:
    """Return the bytes of a parameter struct with llama.cpp's default values."""
    return bytes(struct(**{name: value for name, value in DEFAULTS[struct].items()}))


def write_library(
    path: Path,
    *,
    context: bytes = default_bytes(llama_context_params),
    model: bytes = default_bytes(llama_model_params),
    batch: str = BATCH,
    rest: str = LINKED,
    without: str = "",
) -> Path:
    """Compile a library at `path` whose default structs have the bytes `context` and `model`."""
    written = {"llama_batch_init", without}
    code = [_struct_function("llama_context_default_params", context), batch, rest]
    code.append(_struct_function("llama_model_default_params", model))
    written |= {"llama_context_default_params", "llama_model_default_params"}
    code += [f"long {name}(void) {{ return 0; }}" for name in FUNCTIONS if name not in written]
    code.append('const char *llama_version(void) { return "test"; }')
    return compile_library(path, "\n".join(code))


def _struct_function(name: str, value: bytes) -> str:
    """Return C code of a function that returns a struct of these bytes."""
    numbers = ", ".join(map(str, value))
    return (
        f"typedef struct {{ _Alignas(8) unsigned char b[{len(value)}]; }} s_{name};\n"
        f"s_{name} {name}(void) {{ s_{name} s = {{{{{numbers}}}}}; return s; }}"
    )


def compile_library(path: Path, code: str) -> Path:
    """Compile C code as a shared library; skips the test where there is no compiler."""
    compiler = shutil.which("g++") or pytest.skip("no C++ compiler")
    command = [compiler, "-x", "c", "-O0", "-w", "-shared", "-fPIC", "-o", str(path), "-"]
    subprocess.run([*command, "-x", "none", "-ldl"], input=code.encode(), check=True)
    return path
