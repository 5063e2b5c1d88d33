"""Assertions of ggml that fail in the middle of a pass: an error, on whichever thread, and everything else goes on.

Each test is a program of its own: a fault would end this process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from gguf_files import write_model
from native_build import test_library
from processes import run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="passes are left on Linux alone")

SUPPORT = Path(__file__).resolve().parents[1] / "support"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
THREADS = {"worker": 1, "caller": 0, "every thread": -1}
BEGIN = """
import os, sys, threading
sys.path.insert(0, SUPPORT)
from failing_op import FailingOp
from lowtide import Embedder, Runtime
from lowtide.runtime.errors import ForwardError

def opened(**options):
    shape = {"memory": "2GiB", "context": 256, "threads": 2, "attention": "llama", "repack": False}
    return Runtime.open(PATH, **{**shape, **options})

def answer(runtime):
    return runtime.generate("ab cd", max_tokens=6, temperature=0).token_ids

def num_threads():
    return len(os.listdir("/proc/self/task"))

def require_failure(work, expected="GGML_ASSERT(value < limit) failed"):
    try:
        work()
    except ForwardError as error:
        assert expected in str(error) and "\\n" not in str(error), error
    else:
        raise SystemExit("nothing failed")

other = opened()
expected = answer(other)
healthy_threads = num_threads()
op = FailingOp(LIBRARY, THREAD)
with op.in_models():
    runtime = opened()
"""


def run(program: str, tmp_path: Path, thread: str = "worker") -> None:
    """Run `program` behind BEGIN: it ends by itself, with 0."""
    path = write_model(tmp_path / "model.gguf", chat_template=TEMPLATE)
    values = {
        "SUPPORT": str(SUPPORT),
        "PATH": str(path),
        "LIBRARY": str(test_library()),
        "THREAD": THREADS[thread],
        "FOLDER": str(tmp_path),
    }
    begin = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    done = run_python(begin + BEGIN + program, timeout=120)
    assert done.code == 0, done.stderr


@pytest.mark.parametrize("thread", THREADS)
def test_the_caller_gets_an_error_and_other_models_go_on(tmp_path: Path, thread: str) -> None:
    program = """
answer(runtime)
op.arm()
require_failure(lambda: answer(runtime))
require_failure(lambda: answer(runtime), "stopped at an error of llama.cpp")
assert answer(other) == expected
# The stopped pass has its threads for ever; the others compute with as many as before.
assert num_threads() == healthy_threads + 1, (num_threads(), healthy_threads)
runtime.close()
with opened() as later:
    assert answer(later) == expected
other.close()
"""
    run(program, tmp_path, thread)


@pytest.mark.parametrize("thread", THREADS)
def test_threads_end_and_forked_children_compute(tmp_path: Path, thread: str) -> None:
    """A thread that left a pass ends, and so does one that never computed."""
    program = """
op.arm()

def fail():
    require_failure(lambda: answer(runtime))
    assert answer(other) == expected

for work in (fail, lambda: answer(other)):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
child = os.fork()
if child == 0:
    with opened() as own:
        os._exit(0 if answer(own) == expected else 3)
assert os.waitpid(child, 0)[1] == 0
"""
    run(program, tmp_path, thread)


def test_models_in_several_threads_fail_alone(tmp_path: Path) -> None:
    """Every failed thread finds its own caller, while another answers all the time."""
    program = """
with op.in_models():
    more = [opened() for _ in range(3)]
op.arm()
errors, ends = [], threading.Event()

def caught(work):
    def run():
        try:
            work()
        except BaseException as error:
            errors.append(error)
    return threading.Thread(target=run)

def answer_until_the_end():
    while not ends.is_set():
        assert answer(other) == expected

healthy = caught(answer_until_the_end)
failing = [caught(lambda m=m: require_failure(lambda: answer(m))) for m in [runtime, *more]]
for thread in [healthy, *failing]:
    thread.start()
for thread in failing:
    thread.join(60)
    assert not thread.is_alive()
ends.set()
healthy.join(60)
assert not errors and not healthy.is_alive(), errors
"""
    run(program, tmp_path)


def test_a_failed_batch_leaves_the_model_to_other_answers(tmp_path: Path) -> None:
    program = """
op.arm()
require_failure(lambda: runtime.generate_batch(["ab cd", "ab"], max_tokens=3))
op.arm(False)
answer(runtime)
runtime.close()
assert answer(other) == expected
"""
    run(program, tmp_path)


def test_a_conversation_is_not_lost(tmp_path: Path) -> None:
    program = """
messages = [{"role": "user", "content": "ab"}]
text = "".join(chunk.text for chunk in runtime.chat(messages, max_tokens=4, temperature=0))
messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "cd"}]
op.arm()
require_failure(lambda: list(runtime.chat(messages, max_tokens=4)))
talk = FOLDER + "/talk.session"
runtime.saved_chats.save(talk, messages)
runtime.close()
op.arm(False)
assert list(other.saved_chats.load(talk).messages) == messages
assert list(other.chat(messages, max_tokens=4))
"""
    run(program, tmp_path)
