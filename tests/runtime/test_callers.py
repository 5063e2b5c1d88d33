"""What callers in Python may pass to every public option: accepted where the meaning is plain, or `BadOption`.

The options are read from the dataclasses, so that a new one is tried, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowtide import Delta, Dense, FakeModel, Gem, LowtideError, Runtime, SamplingParams, Tidal
from lowtide.models.errors import BadOption
from lowtide.runtime.backends.config import INTERNAL_FIELDS, LoadConfig
from lowtide.runtime.embedding.passes import checked_texts

Open = Callable[..., Runtime]


class _Hostile:
    """A value whose every method fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")

    def __index__(self) -> int:
        raise RuntimeError("no number")

    __float__ = __fspath__ = __iter__ = __index__  # type: ignore[assignment]


STRANGE: list[Any] = [
    None, True, False, np.True_, -1, 0, 1, 5, 10**30, 10**5000, -(10**5000), 0.5, 1.0, 512.0, -0.5, 1e300,
    float("nan"), float("inf"), -float("inf"), "", " ", "5", "0.5", "nan", "1e999", "9" * 5000, "x", "\0",
    "\ud800", "x" * 5000, "a\nb", "5 ", "auto", "off", b"5", bytearray(b"x"), (), [], {}, set(), [1, 2], ("a",),
    {"a": 1}, np.int8(5), np.int64(512), np.uint64(2**64 - 1), np.float32(0.5), np.float64("nan"), np.array(5),
    np.array([1, 2]), np.array("x"), Decimal("0.5"), Decimal("NaN"), Fraction(1, 2), 1 + 2j, object(),
    object, print, Path("x"), Path("x" * 300), range(3), iter(()), _Hostile(), lambda: None, Ellipsis,
]  # fmt: skip


def fields_of(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if f.name not in (*INTERNAL_FIELDS, "source")]


@pytest.mark.parametrize("kind", [SamplingParams, Tidal, Delta, Gem, Dense])
def test_any_value_is_accepted_or_a_bad_option(kind: type) -> None:
    for name in fields_of(kind):
        for value in STRANGE:
            try:
                made = kind(**{name: value})
            except BadOption as refused:
                assert "\n" not in str(refused) and len(str(refused)) < 400
                assert name.replace("_", " ") in str(refused).replace("_", " ")
            else:
                assert isinstance(hash(made), int) and repr(made)


def test_any_value_of_opening_is_accepted_or_a_sentence() -> None:
    for name in fields_of(LoadConfig):
        for value in STRANGE:
            try:
                config = LoadConfig.of(**{name: value})
            except LowtideError as refused:
                assert refused.exit_code == 2 and len(str(refused)) < 400
                assert name in str(refused) and "\n" not in str(refused)
                continue
            try:
                Runtime.open(FakeModel(), **{"memory": "8GiB", name: value}).close()
            except LowtideError:
                assert config.num_threads >= 1


def test_any_model_and_profiler_is_accepted_or_a_sentence() -> None:
    for value in STRANGE:
        if value is None:
            continue
        with pytest.raises(LowtideError):
            Runtime.open(value, memory="8GiB")
        with pytest.raises(BadOption, match="profiler is"):
            Runtime.open(FakeModel(), memory="8GiB", profiler=value)


def tried(call: Callable[[], Any]) -> None:
    try:
        call()
    except LowtideError as refused:
        assert refused.exit_code in (1, 2)


def test_any_argument_of_a_runtime_is_accepted_or_a_sentence(
    fake_runtime: Open, tmp_path: Path
) -> None:
    runtime = fake_runtime("Hello.")
    inside = [{"role": "user", "content": "Hi"}]
    for value in STRANGE:
        for call in (
            lambda v: list(runtime.chat(v, max_tokens=1)),
            lambda v: list(runtime.chat([v], max_tokens=1)),
            lambda v: list(runtime.chat([{"role": v, "content": "x"}], max_tokens=1)),
            lambda v: list(runtime.chat([{"role": "user", "content": v}], max_tokens=1)),
            lambda v: list(
                runtime.chat([{v: "user"}] if isinstance(v, str) else inside, max_tokens=1)
            ),
            lambda v: list(runtime.chat(inside, v, max_tokens=1)),
            lambda v: list(runtime.chat(inside, max_tokens=1, tools=v)),
            lambda v: list(runtime.chat(inside, max_tokens=1, tools=[v])),
            lambda v: list(runtime.chat(inside, max_tokens=1, template_arguments=v)),
            lambda v: list(runtime.chat(inside, max_tokens=1, template_arguments={"x": v})),
            lambda v: runtime.generate(v, max_tokens=1),
            lambda v: runtime.generate("x", v, max_tokens=1),
            lambda v: runtime.generate_batch(v, max_tokens=1),
            lambda v: runtime.generate_batch([v], max_tokens=1),
            lambda v: runtime.generate_batch(["x"], v, max_tokens=1),
            runtime.trim,
            runtime.saved_chats.load,
            runtime.saved_chats.read_messages,
            lambda v: runtime.saved_chats.save(tmp_path / "chat", v),
        ):
            tried(lambda call=call, value=value: call(value))  # type: ignore[misc]
    assert list(runtime.chat("Hi"))[-1].finish_reason == "stop"  # the runtime stays usable
    runtime.close()


def test_any_text_to_embed_is_accepted_or_a_sentence() -> None:
    for value in STRANGE:
        tried(lambda value=value: checked_texts(value))  # type: ignore[misc]
        tried(lambda value=value: checked_texts([value]))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tools": "x"}, "tools is 'x'; it must be a list of functions or tools"),
        ({"tools": [None]}, "a tool is None; it must be a function"),
        ({"template_arguments": [("a", 1)]}, "it must be a dict of variables by name"),
        ({"template_arguments": {5: 1}}, "it must be a dict of variables by name"),
    ],
)
def test_what_is_no_tool_or_variable_is_a_sentence(
    fake_runtime: Open, options: dict[str, Any], sentence: str
) -> None:
    with fake_runtime("Hello.") as runtime, pytest.raises(BadOption, match=sentence):
        list(runtime.chat("Hi", max_tokens=1, **options))


def test_a_number_that_is_too_large_is_told_the_largest() -> None:
    with pytest.raises(BadOption, match="it must be at most 2,147,483,647"):
        LoadConfig(context=10**30)


@pytest.mark.parametrize(
    "value",
    [512, "512", " 512 ", 512.0, np.int16(512), np.float64(512), np.array(512), Decimal(512)],
)
def test_a_plain_number_is_accepted_as_any_type(value: Any) -> None:
    config = LoadConfig.of(context=value, memory=value, batch_size=value, gpu_layers=value)
    assert (config.context, config.batch_size) == (512, 512)
    assert config.memory in (512, value)
    params = SamplingParams(max_tokens=value, top_k=value, seed=value, repeat_last_n=value)
    assert (params.max_tokens, params.top_k, params.seed, params.repeat_last_n) == (512,) * 4
    assert type(params.max_tokens) is int
    assert (Tidal(k=value).k, Gem(min_prompt=value).min_prompt, Delta(window=value).window) == (
        512,
    ) * 3


def test_what_is_plain_about_other_options(fake_runtime: Open) -> None:
    assert SamplingParams(stop=None).stop == SamplingParams(stop=[]).stop == ()
    assert SamplingParams(stop="x").stop == SamplingParams(stop=["x"]).stop == ("x",)
    assert SamplingParams(temperature=np.float32(0.5)).temperature == 0.5
    assert SamplingParams(max_tokens=-1, seed=-1) == SamplingParams(max_tokens=None)
    assert SamplingParams.of({"top_k": 3}, top_p=0.5) == SamplingParams(top_k=3, top_p=0.5)
    assert LoadConfig.of(speculate=None, attention=None, repack=None) == LoadConfig()
    assert LoadConfig.of(repack=1).repack is True
    assert Tidal(selection_layers=np.array([2, 5])).selection_layers == (2, 5)
    runtime = fake_runtime("Hello.")
    texts = [
        "".join(c.text for c in runtime.chat(m)) for m in ("Hi", {"role": "user", "content": "Hi"})
    ]
    assert texts == ["Hello."] * 2
    turns = iter([{"role": "user", "content": "Hi"}])
    assert "".join(chunk.text for chunk in runtime.chat(turns)) == "Hello."  # type: ignore[arg-type]


def test_a_share_of_memory_is_a_percentage() -> None:
    with pytest.raises(
        LowtideError, match="memory is 0.5; it must be a size such as '512MiB' or '50%'"
    ):
        LoadConfig.of(memory=0.5)
