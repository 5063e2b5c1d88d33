"""Answers that are closed beside or inside one of their steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence

import numpy as np
import pytest

from lowtide import FakeModel, Runtime
from lowtide.runtime.generation.closable import ClosableGenerator


class _StoppedModel(FakeModel):
    """Waits inside each pass until it is let go on."""

    def __init__(self) -> None:
        super().__init__(("A long answer of many words.",), context=512, batch_size=64)
        self.started, self.go_on = threading.Event(), threading.Event()
        self.during_pass: Callable[[], None] = lambda: None

    def forward(self, token_ids: Sequence[int]) -> np.ndarray:  # type: ignore[type-arg]
        self.started.set()
        self.during_pass()
        assert self.go_on.wait(30)
        return super().forward(token_ids)


@pytest.mark.parametrize("how", ["chat", "stream"])
def test_another_thread_closes_an_answer_that_makes_a_step(how: str) -> None:
    model = _StoppedModel()
    with Runtime.open(model) as runtime:
        answer = runtime.chat("Hi") if how == "chat" else runtime.stream("Hi")
        chunks: list[object] = []
        reader = threading.Thread(target=lambda: chunks.extend(answer))
        reader.start()
        assert model.started.wait(30)
        closed: list[BaseException | None] = []

        def close() -> None:
            try:
                answer.close()
                closed.append(None)
            except BaseException as error:
                closed.append(error)

        closer = threading.Thread(target=close)
        closer.start()
        time.sleep(0.05)  # either order is right; mostly the closer waits now
        model.go_on.set()
        reader.join(30)
        closer.join(30)
        assert closed == [None] and len(chunks) <= 1
        assert "".join(chunk.text for chunk in runtime.chat("Again"))  # it answers still


def test_an_answer_closed_from_inside_its_step_ends_with_it() -> None:
    model = _StoppedModel()
    model.go_on.set()
    with Runtime.open(model) as runtime:
        answer = runtime.stream("Hi")
        model.during_pass = lambda: answer.close()
        assert len(list(answer)) == 1
        model.during_pass = lambda: None
        assert "".join(chunk.text for chunk in runtime.stream("Hi"))


def test_two_threads_share_the_values_of_one_generator() -> None:
    def numbers() -> Generator[int, None, None]:
        for number in range(50):
            time.sleep(0.0005)
            yield number

    shared = ClosableGenerator(numbers())
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.extend(shared)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(50))


def test_a_generator_that_is_continued_inside_its_own_step_is_an_error() -> None:
    def steps() -> Generator[int, None, None]:
        yield next(shared)

    shared = ClosableGenerator(steps())
    with pytest.raises(RuntimeError, match="inside its own step"):
        next(shared)


def test_it_is_a_generator_in_all_else() -> None:
    ended: list[str] = []

    def steps() -> Generator[int, None, None]:
        try:
            yield 1
            yield 2
        except KeyError:
            yield 3
        finally:
            ended.append("end")

    shared = ClosableGenerator(steps())
    assert next(shared) == 1 and shared.throw(KeyError("x")) == 3
    assert list(shared) == [] and ended == ["end"]
    never = ClosableGenerator(steps())
    never.close()
    assert list(never) == [] and ended == ["end"]
