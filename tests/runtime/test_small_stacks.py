"""A thread with little stack is refused a forward pass in a sentence; it would end the process."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_files import write_model
from processes import run_python

PROGRAM = """
import threading
from lowtide import Runtime
from lowtide.runtime.errors import ForwardError
with Runtime.open({path!r}, memory="1GiB", threads=1) as runtime:
    list(runtime.stream("word7 word8", max_tokens=2))  # imports what an answer needs
    found = []
    def answer():
        try:
            found.append(len(list(runtime.stream("word9 " * 20, max_tokens=3, temperature=0))))
        except ForwardError as error:
            found.append(str(error))
    threading.stack_size({kib} << 10)
    thread = threading.Thread(target=answer)
    thread.start()
    thread.join()
    print(found[0])
"""


@pytest.mark.parametrize(("kib", "answers"), [(64, False), (256, True)])
def test_a_thread_with_little_stack(tmp_path: Path, kib: int, answers: bool) -> None:
    path = write_model(tmp_path / "m.gguf")
    done = run_python(PROGRAM.format(path=str(path), kib=kib))
    assert done.code == 0, done.stderr[-500:]
    expected = "3\n" if answers else "KiB of stack left, and a pass needs 96: start it with more"
    assert expected in done.stdout
