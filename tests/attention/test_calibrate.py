"""The search for selection layers, on a small model of random weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gguf_files import write_model

from lowtide.attention.calibrate import Calibrator, NotCalibrated
from lowtide.attention.graph_hook import GraphHook
from lowtide.models.gguf_header import read_spec
from lowtide.models.gguf_model import GgufModel, LoadOptions

CONTEXT = 768


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calibrator]:
    path = write_model(
        tmp_path_factory.mktemp("model") / "random.gguf", layers=6, width=128, heads=2, kv_heads=1
    )
    hook = GraphHook(threads=1)
    options = LoadOptions(context=1024, max_rows=128, threads=1, eval_callback=hook.callback)
    with GgufModel(read_spec(path), options) as model:
        token_ids = [5 + i * i % 300 for i in range(2 * CONTEXT + 2)]
        yield Calibrator(model, hook, token_ids, CONTEXT)
    hook.close()


def test_a_loose_target_takes_one_early_layer_and_the_fewest_keys(search: Calibrator) -> None:
    best = search.best(target_kl=1.0, max_layers=2, k_choices=(256, 128))
    assert best.k == 128
    assert len(best.selection_layers) == 1 and best.selection_layers[0] < 4
    assert best.keys_read < 0.8


def test_a_tighter_target_costs_more(search: Calibrator) -> None:
    loose = search.best(target_kl=1.0, max_layers=4, k_choices=(256, 128))
    tight = search.best(target_kl=loose.kl * 0.8, max_layers=4, k_choices=(256, 128))
    assert tight.kl <= loose.kl * 0.8
    assert tight.keys_read > loose.keys_read


def test_a_target_that_nothing_reaches(search: Calibrator) -> None:
    with pytest.raises(NotCalibrated, match="raise --target-kl, --max-layers or --k"):
        search.best(target_kl=1e-12, max_layers=1, k_choices=(128,))
