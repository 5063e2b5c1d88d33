"""Which kernels run where nothing is said: lowtide's where they work, the engine's own elsewhere, with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_model
from onnx_decoders import write_decoder
from processes import run_lowtide

from lowtide import FakeModel, Runtime
from lowtide.cli.common.output import plan_line, statistics_line
from lowtide.memory.budget import Budget
from lowtide.memory.plan.plan import MemoryPlan, PlanRequest
from lowtide.memory.plan.planner import plan_memory
from lowtide.memory.units import MIB
from lowtide.models.errors import BadOption, LowtideError
from lowtide.models.gguf.header.spec import read_spec
from lowtide.runtime.backends.backend import ResolvedModel
from lowtide.runtime.backends.config import LoadConfig
from lowtide.runtime.backends.kernels import kernel_times
from lowtide.runtime.backends.kernels.kernel_times import KernelTimes
from lowtide.runtime.planning.plan import plan_model, plan_reference

GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
SHAPE: dict[str, Any] = {"width": 256, "feed_forward": 512, "context": 2048}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, float]]:
    """What the comparison measures: lowtide's kernels at half the time of llama.cpp's, unless a test says more."""
    seconds = {"attention, 1 tokens": (0.5, 1.0), "matmul Q4_0, 1 tokens": (0.5, 1.0)}
    monkeypatch.setattr(kernel_times, "measure", lambda _spec: KernelTimes(seconds))
    return seconds


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.gguf", quantised="Q4_0", **SHAPE)


def chosen(planned: ResolvedModel) -> tuple[str, bool]:
    return planned.policy.name, planned.options.repack is True


def plan(path: Path, **options: Any) -> ResolvedModel:
    return plan_reference(path, LoadConfig(**{"memory": "2GiB", "threads": 1, **options}))


def test_both_run_by_default_and_one_switch_is_the_reference(quantised: Path) -> None:
    answers = {}
    for options in ({}, {"attention": "dense", "repack": True}, {"reference": True}):
        with Runtime.open(quantised, memory="1GiB", threads=1, **options) as runtime:
            result = runtime.generate("a b c", **GREEDY)
            answers[str(options)] = (result.token_ids, result.stats.kernels, result.stats.attention)
    default, explicit, (_, reference, attention) = answers.values()
    assert default == explicit
    assert default[1]["attention"].startswith("lowtide, ")
    assert default[1]["matmuls"].startswith("lowtide, ")
    assert default[1]["library"].startswith("llama.cpp ")
    assert (reference["attention"], reference["matmuls"], attention) == (
        "llama.cpp",
        "llama.cpp",
        "llama",
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, " · lowtide's kernels · "),
        ({"reference": True}, " · llama.cpp's kernels · "),
        ({"attention": "llama", "repack": True}, " · llama.cpp's attention, lowtide's matmuls · "),
        ({"repack": False}, " · lowtide's attention, llama.cpp's matmuls · "),
    ],
)
def test_the_statistics_line_says_whose_kernels_ran(
    quantised: Path, options: dict[str, Any], words: str
) -> None:
    with Runtime.open(quantised, memory="1GiB", threads=1, **options) as runtime:
        result = runtime.generate("a b c", **GREEDY)
    assert words in statistics_line(result.stats, result.finish_reason)


def test_the_plan_says_which_kernels_run(quantised: Path) -> None:
    values = json.loads(run_lowtide("plan", str(quantised), "--json").stdout)
    assert set(values["kernels"]) == {"attention", "matmuls", "library"}
    assert values["kernels"]["matmuls"].startswith(("lowtide, ", "llama.cpp"))
    printed = run_lowtide("plan", str(quantised), "--reference").stdout
    assert "Kernels: attention by llama.cpp, llama; matmuls by llama.cpp; llama.cpp " in printed


def test_the_reference_is_llama_and_no_repacking_token_for_token(quantised: Path) -> None:
    tokens = []
    for options in ({"reference": True}, {"attention": "llama", "repack": False}):
        with Runtime.open(quantised, memory="1GiB", threads=1, **options) as runtime:
            tokens.append(runtime.generate("x y", **GREEDY).token_ids)
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("dense", True)),
        ({"attention": "auto", "repack": "auto"}, ("dense", True)),
        ({"attention": "llama"}, ("llama", True)),
        ({"attention": "tidal:k=128"}, ("tidal", True)),
        ({"repack": False}, ("dense", False)),
        ({"reference": True, "attention": "llama", "repack": False}, ("llama", False)),
    ],
)
def test_each_choice_is_made_by_itself(
    quantised: Path, options: dict[str, Any], expected: tuple[str, bool]
) -> None:
    assert chosen(plan(quantised, **options)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "dense"}, "attention is 'dense': leave one of them out"),
        ({"repack": True}, "repack is set: leave one of them out"),
        ({"quality": "fast"}, "quality='fast' chooses the attention policy, but reference"),
    ],
)
def test_the_reference_excludes_other_kernels(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        LoadConfig(reference=True, **options)


@pytest.mark.parametrize("wrong", ["yes", 3, []])
def test_repack_is_auto_or_a_bool(wrong: object) -> None:
    with pytest.raises(BadOption, match="repack is .*; it must be True or False"):
        LoadConfig(repack=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("slow", "expected", "words"),
    [
        ("matmul Q4_0, 1 tokens", ("dense", False), "llama.cpp's own matmuls, because lowtide's matmul takes 3.00"),
        ("attention, 1 tokens", ("llama", True), "llama.cpp's own attention, because lowtide's attention takes 3.00"),
    ],
)  # fmt: skip
def test_a_kernel_that_is_slower_here_does_not_run(
    quantised: Path,
    times: dict[str, tuple[float, float]],
    slow: str,
    expected: tuple[str, bool],
    words: str,
) -> None:
    times[slow] = (3.0, 1.0)
    planned = plan(quantised)
    assert chosen(planned) == expected
    assert words in plan_line(planned)
    assert chosen(plan(quantised, attention="dense", repack=True)) == ("dense", True)


def test_where_llama_cpp_cannot_be_hooked_its_own_kernels_run(
    quantised: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unhooked = KernelTimes({}, "another layout of its nodes")
    monkeypatch.setattr(kernel_times, "measure", lambda _spec: unhooked)
    planned = plan(quantised)
    assert chosen(planned) == ("llama", False)
    assert "llama.cpp's own kernels, because another layout" in plan_line(planned)


def test_weights_without_a_tiled_layout_are_left_to_llama_cpp(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf")
    planned = plan(path)
    assert chosen(planned) == ("dense", False)
    assert "llama.cpp's own matmuls, because F32 weights cannot be repacked" in plan_line(planned)
    with Runtime.open(path, memory="1GiB", threads=1) as runtime:
        assert runtime.generate("a", **GREEDY).stats.not_repacked_reason is None


def test_without_a_place_for_the_copy_the_original_weights_run(
    quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    planned = plan(quantised)
    assert chosen(planned) == ("dense", False)
    assert "have no place" in plan_line(planned)


def test_a_budget_that_only_holds_the_reference_runs_it(quantised: Path) -> None:
    reference = plan(quantised, reference=True)

    def with_baseline(request: PlanRequest, num_bytes: int) -> MemoryPlan:
        budget = Budget(num_bytes=num_bytes, source="a test")
        return plan_memory(reference.spec, request, budget, reference.baseline)

    bound = with_baseline(reference.request, MIB).lower_bound_bytes
    default, least = plan(quantised).request, bound - reference.baseline.tolerance_bytes
    assert with_baseline(default, MIB).lower_bound_bytes == bound
    small, large = (with_baseline(default, n) for n in (least, least + 16 * MIB))
    assert small.fits and not small.own_kernels and large.own_kernels
    assert "kernels: lowtide's to the engine's own" in small.downgrades
    for num_bytes in range(bound - 4 * MIB, bound + 12 * MIB, MIB):
        found = plan(quantised, memory=num_bytes)
        runs_own = ("dense", True) if found.plan.own_kernels else ("llama", False)
        assert chosen(found) == runs_own


def test_a_users_model_and_a_gpu_keep_the_engines_kernels(quantised: Path) -> None:
    planned = plan_model(FakeModel(("Hello.",)), LoadConfig(memory="2GiB"))
    assert chosen(planned) == ("llama", False)
    assert planned.engine_kernels_reason == "a Model object computes as it was loaded"
    config = LoadConfig(gpu_layers=4)
    [choice] = planned_choices(quantised, config)
    assert not (choice.attention or choice.repack) and choice.reason == "layers are on a GPU"


def planned_choices(path: Path, config: LoadConfig) -> tuple[Any, ...]:
    from lowtide.runtime.planning.plan import backend_for

    spec = read_spec(path)
    return backend_for(spec).kernel_choices(spec, config)


def test_onnx_graphs_are_rewritten_by_default(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "decoder", "gqa", bits=4)
    answers = []
    for options in ({}, {"repack": True}, {"reference": True}):
        with Runtime.open(folder, memory="2GiB", threads=1, **options) as runtime:
            result = runtime.generate("a b", **GREEDY)
            answers.append((result.token_ids, result.stats.kernels))
    assert answers[0] == answers[1]
    assert answers[0][1]["attention"].startswith("lowtide, ")
    assert answers[2][1]["attention"] == "onnxruntime"
    assert answers[2][1]["library"].startswith("onnxruntime ")


def test_an_onnx_graph_that_cannot_be_rewritten_runs_as_it_is(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "decoder", "gqa", bits=4)
    planned = plan(folder, attention="llama")
    assert chosen(planned) == ("llama", False)
    bound = plan(folder).plan.lower_bound_bytes
    reference = plan(folder, reference=True).plan.lower_bound_bytes
    least = min(bound, reference)
    assert plan(folder, memory=least + 2 * MIB).plan.fits


def test_embedding_beside_repacked_weights_equals_that_of_the_original(quantised: Path) -> None:
    import numpy as np

    vectors = []
    for options in ({"reference": True}, {}):
        with Runtime.open(quantised, memory="1GiB", threads=1, **options) as runtime:
            before = runtime.generate("a b", **GREEDY).token_ids
            vectors.append(runtime.embed(["hello you", "word7 " * 100]))
            assert runtime.generate("a b", **GREEDY).token_ids == before
    np.testing.assert_allclose(vectors[0], vectors[1], atol=0.02)
    assert np.abs(vectors[0][0] - vectors[0][1]).max() > 0.01


def test_a_graph_that_reads_repacked_weights_in_another_way_runs_from_the_original(
    quantised: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: object) -> None:
        raise LowtideError("the graph reads repacked weights in a way of its own")

    with Runtime.open(quantised, memory="1GiB", threads=1, repack=False) as runtime:
        expected = runtime.generate("a b", **GREEDY).token_ids
    monkeypatch.setattr("lowtide.runtime.backends.gguf.LoadedGguf.check_graph", refuse)
    with pytest.raises(LowtideError, match="in a way of its own"):
        Runtime.open(quantised, memory="1GiB", threads=1, repack=True)
    with Runtime.open(quantised, memory="1GiB", threads=1) as runtime:
        result = runtime.generate("a b", **GREEDY)
    assert result.token_ids == expected
    assert result.stats.repacked_tensors == 0 and result.stats.kernels["matmuls"] == "llama.cpp"
    assert "in a way of its own" in str(result.stats.not_repacked_reason)
