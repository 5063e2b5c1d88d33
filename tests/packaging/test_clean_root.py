"""The wheels of `make wheels` install and answer in a root folder that has Python and no compiler."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

from lowtide.models.catalog import resolve

pytestmark = pytest.mark.slow
DIST = emulated.ROOT / "dist"
MAX_INSTALLED_BYTES = 120_000_000
PROGRAMS = ("sh", "env", "uname")


def wheels() -> list[Path]:
    found = [*DIST.glob("lowtide-*x86_64.whl"), *DIST.glob("lowtide_llama-*x86_64.whl")]
    if len(found) != 2:
        pytest.skip("dist/ has no wheels for x86-64: make wheels")
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheels and everything that they depend on, downloaded outside."""
    emulated.require("bwrap")
    folder = tmp_path_factory.mktemp("root")
    (folder / "bin").mkdir()
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", folder / "wheels", *wheels()], check=True)
    return folder


def inside(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the clean root: the system's libraries, Python and a shell; no network, no compiler."""
    base = sys.base_prefix
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc"]
    arguments = ["bwrap", "--unshare-all", "--die-with-parent", "--proc", "/proc", "--dev", "/dev"]
    for path in filter(lambda path: Path(path).exists(), (*system, base)):
        arguments += ["--ro-bind", path, path]
    # Compilers have parts outside the folders of programs.
    for path in filter(lambda path: Path(path).exists(), ("/usr/lib/gcc", "/usr/lib/llvm-14")):
        arguments += ["--tmpfs", path]
    for program in PROGRAMS:
        arguments += ["--ro-bind", f"/usr/bin/{program}", f"/usr/bin/{program}"]
    model = resolve("smollm2")
    arguments += ["--symlink", "usr/bin", "/bin", "--tmpfs", "/tmp", "--bind", str(root), "/clean"]
    arguments += ["--ro-bind", str(model), "/model.gguf", "--chdir", "/clean", "--clearenv"]
    arguments += ["--setenv", "PATH", "/usr/bin", "--setenv", "HOME", "/clean"]
    return subprocess.run(
        [*arguments, *command], capture_output=True, text=True, timeout=emulated.SECONDS
    )


@pytest.fixture(scope="module")
def lowtide(root: Path) -> str:
    """Install the wheels in the clean root; return the command."""
    python = f"{sys.base_prefix}/bin/python3"
    assert inside(root, "sh", "-c", "command -v gcc cc c++ clang cmake").stdout == ""
    for command in (
        (python, "-m", "venv", "/clean/empty"),
        (python, "-m", "venv", "/clean/venv"),
        (
            "/clean/venv/bin/pip",
            "install",
            "--quiet",
            "--no-index",
            "--find-links",
            "/clean/wheels",
            "lowtide",
            "lowtide-llama",
        ),
    ):
        done = inside(root, *command)
        assert done.returncode == 0, done.stderr
    return "/clean/venv/bin/lowtide"


def test_doctor_finds_the_library_and_the_kernels(root: Path, lowtide: str) -> None:
    done = inside(root, lowtide, "doctor", "/model.gguf")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lowtide-llama" in done.stdout


def test_the_tokens_of_this_installation(root: Path, lowtide: str) -> None:
    options = ("-p", "Hello", "-n", "3", "--temp", "0", "-c", "256", "--reference", "--json")
    done = inside(root, lowtide, "run", "-m", "/model.gguf", *options)
    assert done.returncode == 0, done.stderr
    here = emulated.greedy_tokens([sys.executable], "-m", str(resolve("smollm2")), "--reference")
    assert json.loads(done.stdout)["tokens"] == here


def test_the_installed_size(root: Path, lowtide: str) -> None:
    assert size(root / "venv") - size(root / "empty") <= MAX_INSTALLED_BYTES


def size(folder: Path) -> int:
    """Return the bytes of the files in a folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files)
