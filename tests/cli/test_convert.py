"""`lowtide convert`, as typed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from processes import run_lowtide
from tiny_gguf import write_pair

PROGRAM = "from lowtide.cli.main import run; run()"


def test_a_model_is_converted_and_runs(tmp_path: Path) -> None:
    quantised, exact = write_pair(tmp_path, "llama", "Q4_1")
    folder = tmp_path / "made" / "onnx"
    done = run_lowtide("convert", str(quantised), str(folder))
    assert done.code == 0 and done.stdout == f"{folder}\n"
    assert "All weights keep their values." in done.stderr
    again = run_lowtide("convert", str(exact), str(folder))
    assert again.code == 2 and again.stdout == ""
    assert again.stderr.splitlines()[-1].endswith("or add --force to replace it")
    forced = run_lowtide("convert", str(exact), str(folder), "--force")
    assert forced.code == 0 and "50 matrices of type F32 were quantised to 8 bits" in forced.stderr
    run = run_lowtide("run", str(folder), "--raw", "-p", "tide", "-n", "4", "-t", "1")
    assert run.code == 0, run.stderr


def test_other_files_than_gguf_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.gguf"
    text.write_text("no model at all, but long enough to have a header")
    done = run_lowtide("convert", str(text), str(tmp_path / "onnx"))
    assert done.code == 2 and "is not a GGUF file" in done.stderr
    quantised, _ = write_pair(tmp_path, "llama", "Q4_0")
    folder = tmp_path / "onnx"
    assert run_lowtide("convert", str(quantised), str(folder)).code == 0
    done = run_lowtide("convert", str(folder), str(tmp_path / "twice"))
    assert done.code == 2 and "is not a GGUF model: name a .gguf file" in done.stderr
    assert not (tmp_path / "twice").exists()


def test_a_killed_conversion_leaves_no_folder(tmp_path: Path) -> None:
    quantised, _ = write_pair(tmp_path, "llama", "Q4_0")
    folder = tmp_path / "made" / "onnx"
    code = (
        "import time\n"
        "from pathlib import Path\n"
        "from lowtide.models.read_spec import read_spec\n"
        "from lowtide.models.convert.convert import convert\n"
        f"convert(read_spec(Path({str(quantised)!r})), Path({str(folder)!r}), "
        "advance=lambda num_bytes: time.sleep(60))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        until = time.monotonic() + 30
        while not list(tmp_path.glob("made/.onnx.*/model.onnx.data")):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not folder.exists()
    assert not list(tmp_path.glob("made/*/model.onnx"))


def test_the_error_names_the_missing_extra(tmp_path: Path) -> None:
    quantised, _ = write_pair(tmp_path, "llama", "Q4_0")
    program = f"import sys; sys.modules['onnx'] = None; {PROGRAM}"
    arguments = ["convert", str(quantised), str(tmp_path / "onnx")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True)
    assert done.returncode == 2 and b"pip install 'lowtide[onnx]'" in done.stderr
