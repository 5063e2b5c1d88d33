"""Weight streaming: the addresses of weights, and that results stay the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from requantised import requantised

from lowtide.attention.bindings.library import can_map_lazily
from lowtide.attention.bindings.llama_hook import LlamaHook, NativeSpan, mapped_spans
from lowtide.memory.os.file_mappings import FileMap
from lowtide.memory.os.pages import PAGE_BYTES
from lowtide.models.errors import LowtideError
from lowtide.models.fake_model import fake_spec
from lowtide.models.spec import ModelSpec, WeightGroup, WeightSpan
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, ResolvedModel, plan_reference


def spec_of(*groups: WeightGroup) -> ModelSpec:
    return dataclasses.replace(fake_spec(512), weight_groups=groups)


LAYER = WeightGroup(0, (WeightSpan(0, 4096, 100_000), WeightSpan(0, 300_000, 50_000)))
OUTPUT = WeightGroup(None, (WeightSpan(0, 400_000, 10_000),))


def test_spans_follow_the_mapping_of_the_file() -> None:
    file_map = FileMap(address=1 << 30, num_bytes=450_560, offset=0)
    spans = mapped_spans(spec_of(LAYER, OUTPUT), [{file_map}])
    assert [(s.begin - (1 << 30), s.end - s.begin, s.group) for s in spans] == [
        (4096, 100_000, 0),
        (300_000, 50_000, 0),
        (400_000, 10_000, 1),
    ]
    for span in spans:
        assert span.page_begin % PAGE_BYTES == 0 and 0 <= span.begin - span.page_begin < PAGE_BYTES
        assert span.page_end % PAGE_BYTES == 0 and 0 <= span.page_end - span.end < PAGE_BYTES
        assert 1 << 30 <= span.page_begin < span.page_end <= (1 << 30) + file_map.num_bytes


def test_a_weight_in_two_mappings_becomes_two_spans() -> None:
    maps = {FileMap(1 << 30, 32768, 0), FileMap(1 << 32, 520_192, 32768)}
    spans = mapped_spans(spec_of(LAYER), [maps])
    assert sum(s.end - s.begin for s in spans) == LAYER.num_bytes
    assert [s.begin for s in spans] == sorted(s.begin for s in spans)
    assert len(spans) == 3


def test_a_weight_that_is_not_mapped_is_an_error() -> None:
    with pytest.raises(LowtideError, match="10000 bytes of .* are not mapped.*raise memory"):
        mapped_spans(spec_of(LAYER, OUTPUT), [{FileMap(1 << 30, 393_216, 0)}])


def planned(path: Path, *, streamed: bool, attention: str = "llama") -> ResolvedModel:
    options = LoadConfig(
        memory="4GiB", context=512, batch_size=32, threads=2, attention=attention, repack=False
    )
    made = plan_reference(path, options)
    if not streamed:
        return made
    plan = dataclasses.replace(made.plan, resident_layers=3, memory_map=True)
    return dataclasses.replace(made, plan=plan)


def logits_of(planned_model: ResolvedModel) -> tuple[np.ndarray, Engine]:
    loaded = Engine(planned_model)
    loaded.controller.begin_prefill()
    rows = [loaded.model.forward(tuple(range(5, 35))).copy()]
    loaded.controller.begin_decode()
    rows += [loaded.model.forward((token_id,)).copy() for token_id in (7, 99, 1234)]
    return np.array(rows), loaded


@pytest.mark.skipif(not can_map_lazily(), reason="maps are filled at once on this system")
@pytest.mark.parametrize("attention", ["llama", "dense"])
@pytest.mark.parametrize("quantisation", ["Q4_1", "F16", "Q8_0"])
def test_the_logits_are_bitwise_the_same(
    quantisation: str, attention: str, smollm2: Path, tmp_path: Path
) -> None:
    path = smollm2
    if quantisation != "Q4_1":
        path = requantised(smollm2, tmp_path / "copy.gguf", quantisation)
    resident, loaded = logits_of(planned(path, streamed=False, attention=attention))
    loaded.close()
    streamed, loaded = logits_of(planned(path, streamed=True, attention=attention))
    counts = loaded._loaded._callback.counts() if loaded._loaded._callback else None
    loaded.close()
    assert np.array_equal(resident, streamed)
    assert counts is not None
    # Each pass gave nearly the whole file back, and took the output's product in slices.
    assert counts.weight_bytes_evicted > 3 * 0.5 * path.stat().st_size
    assert counts.matmuls_streamed >= 1
    assert (counts.layers_native == 30) == (attention == "dense")


@pytest.mark.skipif(not can_map_lazily(), reason="maps are filled at once on this system")
def test_two_streamed_models_do_not_disturb_each_other(smollm2: Path) -> None:
    alone, loaded = logits_of(planned(smollm2, streamed=True))
    _, other = logits_of(planned(smollm2, streamed=True))
    loaded.model.truncate(0)
    loaded.model.forward(tuple(range(5, 35)))
    again = [loaded.model.forward((token_id,)).copy() for token_id in (7, 99, 1234)]
    other.close()
    loaded.close()
    assert np.array_equal(alone[1:], np.array(again))


def test_unordered_spans_and_unknown_groups_are_refused() -> None:
    hook = LlamaHook(1)
    first, second = NativeSpan(4096, 8192, 4096, 8192, 0), NativeSpan(8192, 9000, 8192, 12288, 1)
    hook.stream_weights([first, second], b"\0\0")
    for spans, resident in (([second, first], b"\0\0"), ([first, second], b"\0")):
        with pytest.raises(ValueError, match="must be in order, and each group"):
            hook.stream_weights(spans, resident)
    hook.close()
