"""onnxruntime-genai loads converted folders, tokenises like lowtide and gives the same answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_gguf import write_pair

from lowtide import Runtime
from lowtide.models.convert.convert import convert
from lowtide.models.read_spec import read_spec

genai = pytest.importorskip("onnxruntime_genai")

PROMPTS = ("tide tide de", "the tide goes out\n", "12 é")
NUM_TOKENS = 24


def answered(folder: Path, prompt: list[int]) -> list[int]:
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + NUM_TOKENS, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", "Q4_1"), ("gemma3", "Q8_0"), ("qwen2", "Q4_0"), ("qwen3", "Q5_0")],
)
def test_answers_are_the_same(tmp_path: Path, architecture: str, kind: str) -> None:
    quantised, _ = write_pair(tmp_path, architecture, kind)
    folder = convert(read_spec(quantised), tmp_path / "onnx").folder
    tokenizer = genai.Tokenizer(genai.Model(str(folder)))
    with Runtime.open(folder, memory="4GiB", context=128, threads=1) as runtime:
        for text in PROMPTS:
            encode = runtime._model.tokenizer.encode
            # onnxruntime-genai leaves BOS to chat templates.
            plain = encode(text, add_special=False, parse_special=False)
            assert [int(i) for i in tokenizer.encode(text)] == plain
            prompt = encode(text, add_special=True, parse_special=False)
            result = runtime.generate(text, max_tokens=NUM_TOKENS, temperature=0)
            own = list(result.token_ids)
            assert answered(folder, prompt)[: len(own)] == own and own
