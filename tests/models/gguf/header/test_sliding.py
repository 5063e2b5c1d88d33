"""Which layers slide: from the header, from the architecture, and as llama.cpp lays them out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lowtide.models.catalog import NAMED_MODELS, is_installed, resolve
from lowtide.models.gguf.dry_run import SimulatedGguf
from lowtide.models.gguf.header.reader import ArrayValue
from lowtide.models.gguf.header.sliding import PERIODS, sliding_layers
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.gguf.parameters import LoadOptions, context_parameters


def test_a_header_has_a_flag_for_each_layer_or_a_period() -> None:
    key = "new.attention.sliding_window_pattern"
    assert sliding_layers({key: ArrayValue(4, (True, False, True, False))}, "new", 4) == (0, 2)
    assert sliding_layers({key: 3}, "new", 7) == (0, 1, 3, 4, 6)
    assert sliding_layers({key: 1}, "new", 4) == ()
    assert sliding_layers({f"gemma3.{key[4:]}": 2}, "gemma3", 4) == (0, 2)  # before the table


@pytest.mark.parametrize(
    "pattern", [None, 0, -1, True, 2.5, "x", ArrayValue(2, (1, 0)), ArrayValue(9, None)]
)
def test_what_a_header_does_not_say_is_not_known(pattern: object) -> None:
    metadata = {} if pattern is None else {"new.attention.sliding_window_pattern": pattern}
    assert sliding_layers(metadata, "new", 4) is None  # type: ignore[arg-type]


def test_an_architecture_has_a_period() -> None:
    assert sliding_layers({}, "gemma3", 18) == tuple(i for i in range(18) if i not in (5, 11, 17))
    assert all(sliding_layers({}, name, 12) for name in PERIODS)


@pytest.mark.real
@pytest.mark.skipif(not is_installed(NAMED_MODELS[1]), reason="gemma3-270m is not installed")
def test_llama_cpp_has_as_many_layers_without_a_window() -> None:
    spec = read_spec(Path(resolve("gemma3-270m")))
    model = SimulatedGguf(spec)
    options = LoadOptions(context=512, batch_size=32, threads=1, kv_type="f16")
    with model._library.collected_messages() as messages:
        handle = model._api.llama_init_from_model(
            model._model, context_parameters(model._api, options)
        )
    model._api.llama_free(handle)
    model.close()
    counts = [int(found[1]) for line in messages if (found := re.search(r", +(\d+) layers", line))]
    assert counts == [len(spec.full_layers or ()), len(spec.sliding_layers or ())]
