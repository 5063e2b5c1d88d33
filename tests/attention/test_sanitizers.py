"""The C++ core under the compiler's sanitizers: bounds, undefined behaviour, races."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest
from native_build import KERNELS, PROGRAMS, NativeBuild, cached_build

pytestmark = pytest.mark.real


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def build(request: pytest.FixtureRequest) -> NativeBuild:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    # -g1 has line numbers and no variables: a third less to compile.
    flags = ["-O1", "-g1", "-fPIC", f"-fsanitize={request.param}", "-fno-sanitize-recover=all"]
    build = cached_build(request.param.split(",")[0], compiler, flags)
    build.programs(PROGRAMS)
    return build


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_core_under_sanitizers(name: str, build: NativeBuild) -> None:
    program = build.programs([name])[name]
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's address layout is beyond the thread sanitizer")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("agree\n") and not done.stderr


@pytest.mark.parametrize("source", KERNELS)
def test_no_function_of_one_instruction_set_is_linked_into_other_files(
    source: str, build: NativeBuild
) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("the kernels of other processors are built without such flags")
    symbols = subprocess.run(
        ["nm", "--defined-only", build.object(source)], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r" T ", symbols), "its kernels"
    assert not re.findall(r" [Wu] (.+)", symbols), "the linker may choose these for every processor"
