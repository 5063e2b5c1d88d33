"""The search for selection layers, on a small model of random weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from gguf_files import write_model

from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.attention.calibration import NotCalibrated
from lowtide.attention.calibrator import CalibrationContext, Targets
from lowtide.attention.tidal.calibrate import TidalSearch
from lowtide.attention.tidal.policy import Tidal
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.gguf.model import GgufModel
from lowtide.models.gguf.parameters import LoadOptions

CONTEXT = 768


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TidalSearch]:
    path = write_model(
        tmp_path_factory.mktemp("model") / "random.gguf", layers=6, width=128, heads=2, kv_heads=1
    )
    hook = LlamaHook(threads=1)
    options = LoadOptions(context=1024, batch_size=128, threads=1, eval_callback=hook.callback)
    with GgufModel(read_spec(path), options) as model:
        token_ids = [5 + i * i % 300 for i in range(2 * CONTEXT + 2)]
        context = CalibrationContext(
            model=model,
            hook=hook,
            token_ids=token_ids,
            context=CONTEXT,
            framing=lambda text: text + "\n",
            text="a text",
        )
        yield TidalSearch(context, lambda k, layers: Tidal(k=k, selection_layers=layers))
    hook.close()


LOOSE = Targets(kl=1.0, key_loss=1.0)


def test_a_loose_target_takes_one_early_layer_and_the_fewest_keys(search: TidalSearch) -> None:
    best = search.best(LOOSE, max_layers=2, k_choices=(256, 128))
    assert best.k == 128
    assert len(best.selection_layers) == 1 and best.selection_layers[0] < 4
    assert best.keys_read < 0.8


@pytest.mark.parametrize("which", ["kl", "key_loss"])
def test_a_tighter_target_costs_more(search: TidalSearch, which: str) -> None:
    loose = search.best(LOOSE, max_layers=4, k_choices=(256, 128))
    target = getattr(loose, which) * 0.8
    tight = search.best(replace(LOOSE, **{which: target}), max_layers=4, k_choices=(256, 128))
    assert getattr(tight, which) <= target
    assert tight.keys_read > loose.keys_read


@pytest.mark.parametrize("which", ["kl", "key_loss"])
def test_if_nothing_reaches_the_target_there_is_no_calibration(
    search: TidalSearch, which: str
) -> None:
    with pytest.raises(
        NotCalibrated, match="raise --target-kl, --target-key-loss, --max-layers or"
    ):
        search.best(replace(LOOSE, **{which: 1e-12}), max_layers=1, k_choices=(128,))


def test_layers_of_the_user_get_the_smallest_k_that_holds(search: TidalSearch) -> None:
    found = search.of_layers(LOOSE, (1, 3), k_choices=(256, 128))
    assert (found.selection_layers, found.k) == ((1, 3), 128)
    tighter = Targets(kl=found.kl * 0.9, key_loss=1.0)
    assert search.of_layers(tighter, (1, 3), k_choices=(256, 128)).k == 256
    with pytest.raises(
        NotCalibrated, match=r"selection layers 1\+3 with k up to 256 .* name more layers"
    ):
        search.of_layers(replace(LOOSE, kl=1e-12), (1, 3), k_choices=(256, 128))
