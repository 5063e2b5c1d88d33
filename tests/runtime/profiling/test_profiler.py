"""The profiler: what it records, and that it changes no answer."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import run_python

from lowtide import FakeModel, Profiler, Runtime
from lowtide.memory.plan.estimates import profiler_bytes
from lowtide.memory.units import MIB
from lowtide.models.errors import BadOption
from lowtide.runtime.profiling.report import ProfileReport, layer_seconds
from lowtide.runtime.profiling.timeline import (
    MAX_SAMPLES,
    MAX_SPANS,
    LayerPass,
    MemorySample,
    Span,
    Timeline,
)


def profiled_fake(**options: object) -> tuple[Profiler, list[object]]:
    events: list[object] = []
    profiler = Profiler(events.append)
    with Runtime.open(FakeModel(["Hello."]), memory="8GiB", profiler=profiler) as runtime:
        list(runtime.chat([{"role": "user", "content": "Hi"}], **options))
    return profiler, events


def test_spans_of_a_chat() -> None:
    profiler, events = profiled_fake()
    phases = {phase.name: phase for phase in profiler.report().phases}
    assert {"plan", "template", "tokenise", "truncate", "prefill pass", "decode pass"} <= set(
        phases
    )
    assert phases["decode pass"].calls == 6 and phases["sampling"].calls == 7
    spans = list(profiler.timeline.spans)
    assert [e for e in events if isinstance(e, Span)] == spans
    assert [e for e in events if isinstance(e, MemorySample)] == profiler.timeline.samples
    assert all(span.begin_ns <= span.end_ns for span in spans)
    assert next(span for span in spans if span.name == "prefill pass").num_rows == 22


def test_phases_of_nested_spans_sum_up_to_the_run() -> None:
    profiler = Profiler()
    with (
        Runtime.open(FakeModel(["Hello."]), memory="8GiB", profiler=profiler) as runtime,
        profiler.span("mine"),
    ):
        runtime.generate("Hi\n")
    report = profiler.report()
    spans = {span.name: span for span in profiler.timeline.spans}
    mine = next(phase for phase in report.phases if phase.name == "mine")
    assert spans["mine"].depth == 0 and spans["sampling"].depth == 1
    assert mine.seconds < (spans["mine"].end_ns - spans["mine"].begin_ns) / 1e9
    assert sum(phase.seconds for phase in report.phases) == pytest.approx(report.seconds, rel=0.02)


def test_measured_components_are_those_of_the_plan_and_sum_up_to_the_resident_set() -> None:
    profiler, _ = profiled_fake()
    report = profiler.report()
    components = [row.component for row in report.plan.rows]
    assert [row.component for row in report.measured] == [*components, "other"]
    assert sum(row.num_bytes or 0 for row in report.measured) == report.resident_bytes
    unmeasured = {row.component for row in report.measured if row.num_bytes is None}
    assert unmeasured == {"loading", "profiler", "reserve"}
    assert all(row.how for row in report.measured)
    assert report.layers == ()


def test_a_profiler_observes_one_runtime() -> None:
    profiler, _ = profiled_fake()
    with pytest.raises(BadOption, match="create one profiler per runtime"):
        Runtime.open(FakeModel(), memory="8GiB", profiler=profiler)
    with pytest.raises(BadOption, match="no runtime was opened with this profiler"):
        Profiler().report()


def test_the_runtime_is_usable_after_a_failed_callback() -> None:
    def fail_once(event: object) -> None:
        if isinstance(event, Span) and event.name == "decode pass" and not failed:
            failed.append(event)
            raise ZeroDivisionError

    failed: list[object] = []
    with Runtime.open(FakeModel(), memory="8GiB", profiler=Profiler(fail_once)) as runtime:
        with pytest.raises(ZeroDivisionError):
            runtime.generate("Hi\n")
        assert runtime.generate("Hi\n").text == "Hello."


def test_nothing_is_recorded_without_a_profiler(fake_runtime: Callable[..., Runtime]) -> None:
    from lowtide.runtime.profiling.profiler import SILENT

    before = dict(vars(SILENT))
    runtime = fake_runtime()
    runtime.generate("Hi\n")
    assert runtime._profiler is SILENT and vars(SILENT) == before == {}


def test_the_timeline_of_a_long_run_is_bounded() -> None:
    timeline = Timeline()
    for at in range(2 * MAX_SAMPLES):
        timeline.add_sample(MemorySample(at, 10_000 if at == 7 else at, {}, 0))
    assert len(timeline.samples) <= MAX_SAMPLES
    assert max(sample.resident_bytes for sample in timeline.samples) == 10_000
    times = [sample.at_ns for sample in timeline.samples]
    assert times == sorted(times) and times[-1] == 2 * MAX_SAMPLES - 1
    for at in range(50_010):
        timeline.add_span(Span("x", at, at + 1, 0))
    assert timeline.num_dropped == 10 and len(list(timeline.spans)) == 50_000


def test_seconds_per_layer() -> None:
    timed = LayerPass("decode pass", 0, 10_000, (2_000, 0, 5_000), (500, 0, 600))
    assert layer_seconds(timed) == [2e-6, 0, 3e-6, 5e-6]


_RUN = """
import json
import tracemalloc
from lowtide import Profiler, Runtime
profiler = Profiler()
options = {options}
with Runtime.open("smollm2", memory="1GiB", profiler=profiler, **options) as runtime:
    answers = [runtime.generate("word " * 700, max_tokens=24, temperature=0)]
    samples = profiler.timeline.samples
    last = samples[-1]
values = profiler.report().to_dict()
values["last"] = last.components
values["tokens"] = max(sample.num_tokens for sample in samples)
values["sums"] = all(sum(s.components.values()) == s.resident_bytes for s in samples)
values["answer"] = answers[0].token_ids
values["timed"] = profiler.report().num_timed_passes
print(json.dumps(values))
"""


def profiled(**options: object) -> dict[str, object]:
    done = run_python(_RUN.replace("{options}", repr(options)))
    assert done.code == 0, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert abs(values["peak_rss_bytes"] - done.peak_bytes) < 2 * MIB
    return values  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def plain() -> dict[str, object]:
    return profiled(context=2048, reference=True)


@pytest.mark.real
def test_bytes_of_a_real_model(plain: dict[str, object], smollm2: Path) -> None:
    """Compares each component with an independent estimate."""
    rows = {row["component"]: row["bytes"] for row in plain["measured"]}  # type: ignore[attr-defined]
    planned = {row["component"]: row["bytes"] for row in plain["plan"]["rows"]}  # type: ignore[index]
    assert plain["sums"]
    assert sum(value or 0 for value in rows.values()) == plain["resident_bytes"]
    assert plain["resident_bytes"] <= plain["peak_rss_bytes"]  # type: ignore[operator]
    file_bytes = smollm2.stat().st_size
    assert 0.98 * file_bytes <= rows["weights"] <= 1.01 * file_bytes
    kv_bytes = plain["tokens"] * 23040  # type: ignore[operator]
    assert kv_bytes * 0.9 <= rows["KV cache"] <= kv_bytes + 64 * 23040 + 60 * 4096 + MIB
    assert 2 * MIB < rows["vocabulary"] <= planned["vocabulary"]
    # The bound is loose, because how much of the libraries is resident differs from machine to machine.
    assert 20 * MIB < rows["interpreter and libraries"] < 70 * MIB
    assert -MIB < rows["compute buffer"] <= planned["compute buffer"] + 2 * MIB
    assert -MIB < rows["other"] <= planned["reserve"]


@pytest.mark.real
def test_time_by_layer_with_llama_cpps_attention(plain: dict[str, object]) -> None:
    layers = plain["layers"]
    assert [layer["name"] for layer in layers] == [*map(str, range(30)), "output"]  # type: ignore
    prefill, decode = plain["timed"]  # type: ignore[misc]
    assert prefill >= 6 and decode == 3
    for layer in layers:  # type: ignore[attr-defined]
        assert layer["prefill_pass_s"] > 0 and layer["decode_pass_s"] > 0
        assert layer["decode_attention_s"] is None
    phases = {phase["name"]: phase for phase in plain["phases"]}  # type: ignore[attr-defined]
    whole = phases["prefill pass"]["seconds"] / phases["prefill pass"]["calls"]
    summed = sum(layer["prefill_pass_s"] for layer in layers)  # type: ignore[attr-defined]
    assert summed == pytest.approx(whole, rel=0.05)


@pytest.mark.real
def test_lowtides_attention_by_layer_and_its_scratch() -> None:
    values = profiled(context=1024, attention="dense")
    for layer in values["layers"][:-1]:  # type: ignore[index]
        assert 0 < layer["decode_attention_s"] < layer["decode_pass_s"]
        assert 0 < layer["prefill_attention_s"] < layer["prefill_pass_s"]
    rows = {row["component"]: row["bytes"] for row in values["measured"]}  # type: ignore[attr-defined]
    assert 0 < rows["attention scratch"] <= values["plan"]["rows"][5]["bytes"]  # type: ignore[index]


def test_logits_are_bitwise_the_same(smollm2: Path) -> None:
    """Timing layers computes the same graph in parts."""
    results = []
    for profiler in (None, Profiler(), None):
        with Runtime.open(
            smollm2, memory="8GiB", context=512, threads=1, profiler=profiler
        ) as runtime:
            logits = runtime._session.append(list(range(300, 400)))
            results.append(logits.tobytes())
            results[-1] += b"".join(runtime._session.decode_token(t).tobytes() for t in range(20))
    assert len(set(results)) == 1


def test_without_a_hook_there_are_no_layers(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowtide.models.errors import LowtideError

    def refuse(_threads: int) -> None:
        raise LowtideError("laid out in another way")

    monkeypatch.setattr("lowtide.runtime.backends.gguf.LlamaHook", refuse)
    profiler = Profiler()
    with Runtime.open(
        smollm2, memory="8GiB", context=512, reference=True, profiler=profiler
    ) as runtime:
        runtime.generate("The tide", max_tokens=2)
    report = profiler.report()
    assert isinstance(report, ProfileReport) and report.layers == ()
    with pytest.raises(LowtideError, match="laid out"):
        Runtime.open(smollm2, memory="8GiB", attention="dense", profiler=Profiler())


@pytest.mark.real
def test_a_full_timeline_fits_into_its_line_of_the_plan() -> None:
    num_layers = 30
    tracemalloc.start()
    timeline = Timeline()
    for i in range(MAX_SPANS + 10):
        timeline.add_span(Span("decode pass", 10**12 + i, 2 * 10**12 + i, 1, 1))
    for i in range(MAX_SAMPLES - 1):
        components = {f"component {n}": 10**9 + n * i for n in range(10)}
        timeline.add_sample(MemorySample(10**12 + i, 10**9 + i, components, 1000 + i))
        times = tuple(10**6 * i + n for n in range(num_layers))
        timeline.add_pass(LayerPass("decode pass", 10**12 + i, 2 * 10**12 + i, times, times[::-1]))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert timeline.num_dropped == 10
    assert profiler_bytes(num_layers) / 4 < used <= profiler_bytes(num_layers)
