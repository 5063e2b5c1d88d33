"""Policies as values: how they are typed, which settings they refuse, and a policy of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from lowtide import Runtime
from lowtide.attention.bindings.policy import AttentionKernels
from lowtide.attention.bindings.structs import SelectionRule
from lowtide.attention.delta.policy import Delta
from lowtide.attention.dense import Dense, Llama
from lowtide.attention.gem.policy import Gem
from lowtide.attention.policy import AttentionPolicy, PassController
from lowtide.attention.registry import POLICIES, parse_policy
from lowtide.attention.tidal.policy import Tidal
from lowtide.models.errors import BadOption
from lowtide.models.fake_model import FakeModel
from lowtide.models.spec import ModelSpec


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dense", Dense()),
        ("tidal", Tidal()),
        ("tidal:k=512", Tidal(k=512)),
        ("tidal:k=10%", Tidal(k=0.1)),
        ("tidal:k=300,layers=2+13", Tidal(k=300, selection_layers=(2, 13))),
        ("gem", Gem()),
        ("gem:k=10%,layer=3", Gem(k=0.1, layer=3)),
        ("delta", Delta()),
        ("delta:sparsity=0.5", Delta(sparsity=0.5)),
        ("delta:granularity=token,sparsity=30%,window=256", Delta(sparsity=0.3, window=256)),
        ("delta:prompts=exact,refine=0", Delta(prompts="exact", refine=0)),
        ("delta:refine=0.5%", Delta(refine=0.005)),
        ("delta:calibration=/x.json", Delta(calibration=Path("/x.json"))),
        ("delta:granularity=block", Delta(granularity="block")),
        (
            "delta:granularity=block,block=16,sparsity=30%",
            Delta(granularity="block", block=16, sparsity=0.3),
        ),
        ("delta:granularity=element,window=64", Delta(granularity="element", window=64)),
    ],
)
def test_a_policy_is_parsed(text: str, expected: AttentionPolicy) -> None:
    assert parse_policy(text) == expected
    assert parse_policy(expected) is expected


def test_every_policy_is_known_by_its_name() -> None:
    assert list(POLICIES) == ["llama", "dense", "tidal", "delta", "gem"]
    assert isinstance(parse_policy("llama"), Llama)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flash", "attention is 'flash'; it must be one of llama, dense, tidal, delta, gem"),
        ("llama:k=5", "llama has no setting 'k'; its settings are: none"),
        ("dense:k=5", "dense has no setting 'k'; its settings are: prompts"),
        ("tidal:keys=5", "no setting 'keys'; its settings are: k, layers"),
        ("tidal:k=many", "tidal's k is 'many'; it must be a number of tokens or a percentage"),
        ("tidal:k=0%", "tidal's k is '0%'"),
        ("tidal:k=120%", "tidal's k is '120%'"),
        ("tidal:layers=2,13", "no setting '13'"),
        ("tidal:layers=two", r"tidal's layers is 'two'; it must be layer numbers joined by \+"),
        ("gem:layers=3", "gem has no setting 'layers'; its settings are: k, layer"),
        ("delta:k=5", "delta has no setting 'k'; its settings are: granularity, block"),
        ("delta:window=wide", "delta's window is 'wide'; it must be a whole number"),
        ("delta:sparsity=half", "'half'; it must be a share or a percentage"),
        ("delta:refine=many", "delta's refine is 'many'; it must be a share or a percentage"),
        ("delta:granularity=block,block=big", "block is 'big'; it must be a whole number"),
    ],
)
def test_an_unknown_setting_or_value_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadOption, match=message):
        parse_policy(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tidal(k=0), "tidal's k is 0; it must be a number of tokens above 68"),
        (lambda: Tidal(k=-5), "tidal's k is -5"),
        (lambda: Tidal(k=68), "k is 68; it must be a whole number above 68"),
        (lambda: Tidal(recent=0), "recent is 0; it must be at least 1"),
        (lambda: Tidal(sinks=-1), "sinks is -1; it must be at least 0"),
        (lambda: Tidal(refresh=0), "refresh is 0; it must be at least 1"),
        (lambda: Tidal(refresh=65), "refresh is 65 and recent is 64"),
        (lambda: Tidal(correction=-1), "correction is -1"),
        (lambda: Gem(k=0), "gem's k is 0; it must be a number of tokens"),
        (lambda: Gem(k=67), "k is 67; it must be at least 68"),
        (lambda: Gem(weights="sharp"), "weights is 'sharp'; it must be softmax or raw"),
        (lambda: Gem(heads="mean"), "heads is 'mean'; it must be max or sum"),
        (lambda: Gem(rows=0), "rows is 0; it must be between 1 and 32"),
        (lambda: Gem(rows=33), "rows is 33; it must be between 1 and 32"),
        (lambda: Gem(pool_size=4), "pool_size is 4; it must be an odd number"),
        (lambda: Gem(last=-1), "gem's last is -1; it must be at least 0"),
        (lambda: Delta(window=-1), "delta's window is -1; it must be between 1 and 65,536"),
        (lambda: Delta(window=0), "window is 0"),
        (lambda: Delta(sinks=8), "delta's sinks is 8; it must be between 0 and 7"),
        (lambda: Delta(sparsity=0.9), "sparsity is 0.9; it must be between 0 and 0.875"),
        (lambda: Delta(sparsity=-0.1), "sparsity is -0.1"),
        (lambda: Delta(sparsity=float("nan")), "sparsity is nan"),
        (lambda: Delta(refine=2), "delta's refine is 2; it must be between 0 and 1"),
        (lambda: Delta(refine=float("nan")), "refine is nan"),
        (lambda: Delta(prompts="bf16"), "'bf16'; it must be grouped or exact"),
        (
            lambda: Delta(sparsity=0.5, calibration=Path("x")),
            "delta's calibration has its own sparsity",
        ),
        (
            lambda: Delta(granularity="head"),
            "granularity is 'head'; it must be token, block or element",
        ),
        (lambda: Delta(block=8), "block is 8 and its granularity is token: leave block out"),
        (lambda: Delta(threshold=1), "threshold is for granularity block and element"),
        (lambda: Delta(granularity="block", block=4), "block is 4; it must be 8 or 16 channels"),
        (
            lambda: Delta(granularity="element", block=8),
            "block is 8 and its granularity is element",
        ),
        (
            lambda: Delta(granularity="block", threshold=-1),
            "threshold is -1; it must be between 0 and 1e",
        ),
        (lambda: Delta(granularity="block", threshold=float("nan")), "threshold is nan"),
        (
            lambda: Delta(granularity="block", sparsity=0.96),
            "sparsity is 0.96; it must be between 0 and 0.95",
        ),
        (
            lambda: Delta(granularity="block", sparsity=0.5, threshold=1),
            "delta's sparsity follows from its threshold",
        ),
    ],
)
def test_a_value_outside_the_range_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        make()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Tidal(selection_layers=(30,)), "include layer 30; .* has layers 0 to 29"),
        (Tidal(selection_layers=(8, 2)), r"are 8\+2; each must be named once, in order"),
        (Tidal(selection_layers=(2, 2)), "each must be named once, in order"),
        (Gem(layer=30), "gem's layer is 30; .* has layers 0 to 29"),
        (Gem(then=Delta()), "gem's then is 'delta'; it must be dense or tidal"),
        (Gem(then=Llama()), "gem's then is 'llama'; it must be dense or tidal"),
    ],
    ids=["unknown", "unordered", "twice", "gem-layer", "gem-delta", "gem-llama"],
)
def test_a_model_that_cannot_run_the_policy_is_refused_before_loading(
    policy: AttentionPolicy, message: str, smollm2: Path
) -> None:
    with pytest.raises(BadOption, match=message):
        Runtime.open(smollm2, memory="8GiB", context=512, attention=policy)


@pytest.mark.parametrize("policy", [Delta(sparsity=0.5), Delta(granularity="block", sparsity=0.5)])
def test_delta_needs_as_many_kv_heads_in_every_layer(
    policy: Delta, smollm2_spec: ModelSpec
) -> None:
    spec = replace(smollm2_spec, num_kv_heads=(2, *smollm2_spec.num_kv_heads[1:]))
    with pytest.raises(BadOption, match="same number of KV heads in every layer, .* has 2, 3"):
        policy.resolve(spec)


def test_a_model_of_the_users_own_has_no_graph_to_hook() -> None:
    with pytest.raises(BadOption, match="attention='tidal' does not work with a Model object"):
        Runtime.open(FakeModel(["x"]), memory="8GiB", attention="tidal:layers=1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sinks(AttentionPolicy):
    """Layer 0 is dense; the others attend to the first 4 and the last `window` keys (StreamingLLM)."""

    name: ClassVar[str] = "sinks"
    window: int = 64

    def configure(self, kernels: AttentionKernels, spec: ModelSpec) -> PassController:
        rule = SelectionRule(self.window + 4, 0.0, 4, self.window, 0)
        kernels.set_roles(bytes([1]) + bytes([2]) * (spec.num_layers - 1), rule)
        return SinksController(kernels)


class SinksController(PassController):
    """Reads prompts densely, and decodes sparsely."""

    def __init__(self, kernels: AttentionKernels) -> None:
        self._kernels = kernels

    def begin_prefill(self) -> None:
        self._kernels.start_pass(sparse=False)

    def begin_decode(self) -> None:
        self._kernels.start_pass(sparse=True)


def test_a_policy_of_the_users_own_needs_nothing_of_the_package(smollm2: Path) -> None:
    prompt = "The tide comes in twice a day. " * 40
    answers = {}
    for policy in (Dense(), Sinks(window=2048), Sinks(window=16)):
        with Runtime.open(
            smollm2, memory="2GiB", context=512, threads=1, attention=policy
        ) as runtime:
            answers[policy] = runtime.generate(prompt, max_tokens=4, temperature=0)
    dense, wide, narrow = answers.values()
    assert wide.token_ids == dense.token_ids
    assert narrow.stats.attention == "sinks"
    assert narrow.stats.attended_share is not None and narrow.stats.attended_share < 0.2
