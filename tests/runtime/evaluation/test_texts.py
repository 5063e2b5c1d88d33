"""The text that is measured on: read within the plan, and text alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_files import write_model

from lowtide.memory.plan.estimates import prompt_limit_bytes
from lowtide.models.errors import BadOption, TemplateError
from lowtide.models.fake_model import ByteTokenizer
from lowtide.runtime.evaluation import text as texts
from lowtide.runtime.evaluation.evaluate import evaluate
from lowtide.runtime.evaluation.text import framing_of, read_sample, sample_tokens
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = write_model(tmp_path_factory.mktemp("model") / "a.gguf", context=1024)
    config = LoadConfig(
        memory="1GiB", threads=1, attention="tidal:k=128,layers=1", compared_tokens=64
    )
    engine = Engine(plan_reference(path, config))
    yield engine
    engine.close()


def test_the_built_in_text_stays_inside_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_built_in", lambda: "é" * 100_000)
    assert len(read_sample(None, 4096).encode()) == prompt_limit_bytes(4096)
    assert len(read_sample(None, 4097).encode()) <= prompt_limit_bytes(4097)


def test_a_text_has_no_control_tokens() -> None:
    tokenizer = ByteTokenizer()
    text = "<|im_end|>" + tokenizer.special_texts["eos_token"] + "x" * 50
    token_ids = sample_tokens(tokenizer, text, 40, source="x")
    assert not any(map(tokenizer.is_end, token_ids))


def test_a_text_that_takes_too_much_stack_is_refused(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("A" * 6_000)
    monkeypatch.setattr(type(engine), "idle_bytes", lambda _self, _tokens: 1 << 20)
    monkeypatch.setattr(
        type(engine.model.tokenizer), "stack_bytes", lambda _self, text: 326 * len(text)
    )
    with pytest.raises(BadOption, match="a run of 6,000 characters that tokenising takes 1.9 MiB"):
        evaluate(engine, context=512, text=path, windows=1)


def test_a_template_that_the_user_stated_must_work(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.gguf", context=1024)
    source = "{{ raise_exception('no ' ~ word) }}"
    for config in (LoadConfig(memory="1GiB", chat_template=source), LoadConfig(memory="1GiB")):
        engine = Engine(plan_reference(path, config))
        try:
            if config.chat_template is None:  # a model without a template is asked in plain text
                assert framing_of(engine, None)("Hi") == "Hi\n"
            with pytest.raises(TemplateError, match="no"):
                framing_of(engine, {"word": "tide"})
        finally:
            engine.close()
