"""Models with random weights follow any schema: at any temperature, over GGUF and ONNX, alone and in batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from gguf_files import write_model
from hypothesis import given
from hypothesis import strategies as st
from onnx_decoders import Shape, write_decoder

from lowtide import FakeModel, JsonSchema, Runtime, SamplingParams, Tidal
from lowtide.models.errors import BadOption
from lowtide.models.fake_model import NUM_TOKENS

NAMES = st.sampled_from(["a", "b c", "é", 'q"', "long_name"])
LEAVES = st.one_of(
    st.fixed_dictionaries(
        {"type": st.just("integer"), "minimum": st.integers(-20, 0), "maximum": st.integers(0, 99)}
    ),
    st.fixed_dictionaries(
        {"type": st.just("string"), "minLength": st.integers(0, 3), "maxLength": st.integers(3, 9)}
    ),
    st.sampled_from(
        [
            {"type": ["number", "null"]},
            {"type": "boolean"},
            {"enum": ["red", 3, None, [1, {"x": "y"}]]},
            {"const": 'a "quote"'},
            {"type": "string", "pattern": "^[A-F]{2}-[0-9]+$"},
            {"type": "string", "format": "date"},
            {"type": "integer", "multipleOf": 7},
        ]
    ),
)


def _object(properties: dict[str, Any], num_required: int, rest: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": sorted(properties)[:num_required],
        "additionalProperties": rest,
    }


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(
            _object,
            st.dictionaries(NAMES, inner, max_size=3),
            st.integers(0, 3),
            st.one_of(st.just(False), inner),
        ),
        st.fixed_dictionaries(
            {
                "type": st.just("array"),
                "items": inner,
                "minItems": st.integers(0, 2),
                "maxItems": st.integers(2, 4),
            }
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}),
    ),
    max_leaves=8,
).flatmap(lambda schema: st.sampled_from([schema, {"$ref": "#/$defs/x", "$defs": {"x": schema}}]))


class RandomModel(FakeModel):
    """A model whose logits are random, the same for the same text."""

    def __init__(self, seed: int) -> None:
        super().__init__(["unused"], context=512)
        self._weights = np.random.default_rng(seed).normal(0, 4, (64, NUM_TOKENS))

    def forward(self, token_ids: Sequence[int]) -> Any:
        logits = super().forward(token_ids)
        logits[:] = self._weights[hash((self.num_tokens, *token_ids[-2:])) % 64]
        return logits


@given(
    schema=SCHEMAS,
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.0, 0.7, 2.0, 50.0]),
    top_k=st.sampled_from([0, 3, 40]),
    style=st.sampled_from(["flexible", "pretty", "compact"]),
    max_tokens=st.sampled_from([16, 40, 120]),
)
def test_any_schema_and_any_weights(
    schema: Any, seed: int, temperature: float, top_k: int, style: str, max_tokens: int
) -> None:
    with Runtime.open(RandomModel(seed), memory="8GiB") as runtime:
        try:
            result = runtime.generate(
                "Q\n",
                response_format=JsonSchema(schema, style),
                temperature=temperature,
                top_k=top_k,
                top_p=1,
                min_p=0,
                seed=seed,
                max_tokens=max_tokens,
            )
        except BadOption as refused:
            assert "tokens" in str(refused) or "max_tokens" in str(refused)
            return
    assert result.not_parsed_reason is None
    jsonschema.validate(result.parsed, schema)
    assert len(result.token_ids) <= max_tokens


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    sizes = {"layers": 3, "width": 64, "heads": 2, "kv_heads": 1, "feed_forward": 64}
    shape = Shape(layers=3, kv_heads=2, context=1024)
    return {
        "gguf": write_model(folder / "tiny.gguf", vocabulary=512, **sizes),
        "onnx": write_decoder(folder / "onnx", "gqa", shape),
    }


TRIED = (
    {"type": "array", "items": {"enum": ["red", "green", 7]}, "minItems": 2, "maxItems": 5},
    _object({"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer"}}, 2, False),
    {"anyOf": [{"type": "string", "pattern": "^[A-F]{2}-[0-9]+$"}, {"type": "null"}]},
)


@pytest.mark.parametrize("attention", ["llama", "dense", Tidal(k=80, selection_layers=(1,))])
@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_real_backends(models: dict[str, Path], kind: str, attention: Any) -> None:
    with Runtime.open(
        models[kind], memory="4GiB", context=256, threads=1, attention=attention
    ) as runtime:
        for i, schema in enumerate(TRIED * 2):
            form = JsonSchema(schema, "pretty")
            params = SamplingParams(
                temperature=3.0 * (i % 2), seed=i, max_tokens=60, constraint=form
            )
            first = runtime.generate("Once upon a time", params)
            jsonschema.validate(json.loads(first.text), schema)
            again = runtime.generate("Once upon a time", params)
            assert again.token_ids == first.token_ids
