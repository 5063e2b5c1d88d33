"""The prefix cache with real models: the same bits as without another prompt between, in planned memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf_files import write_model
from processes import run_lowtide, run_python
from recorded import recorded_logits

from lowtide import GenerationResult, Runtime, Tidal
from lowtide.memory.os.kv_pages import can_use_demand_zero
from lowtide.memory.units import MIB

pytestmark = pytest.mark.real

STORY = "Tell me about the sea. " * 16
OTHER = "Ships are made of wood or of steel. " * 12

CASES = [
    ("smollm2", "f16", "llama"),
    ("smollm2", "q8_0", "llama"),
    ("smollm2", "f16", "dense"),
    ("smollm2", "q8_0", Tidal(k=69, correction=5)),
    ("gemma3-270m", "f16", "llama"),
]


def _answer(runtime: Runtime, *texts: str) -> GenerationResult:
    """Answer a chat of these texts, or continue them where the model has no chat template."""
    if runtime.spec.chat_template is None:
        return runtime.generate(" ".join(texts), temperature=0, max_tokens=8)
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return GenerationResult.of(runtime.chat(messages, temperature=0, max_tokens=8))


def _turns(runtime: Runtime, between: str | None) -> tuple[list[GenerationResult], list[bytes]]:
    """Answer a turn, the next one, and half of the first one; `between` is answered before the last two."""
    answer = _answer(runtime, STORY).text
    all_logits: list[bytes] = []
    results = []
    for texts in ((STORY, answer, "And of the tide?"), (STORY[: len(STORY) // 2],)):
        if between:
            _answer(runtime, between)
        with recorded_logits(runtime) as logits:
            results.append(_answer(runtime, *texts))
        all_logits += logits
    return results, all_logits


@pytest.mark.parametrize(("model", "kv_type", "attention"), CASES)
def test_a_restored_prompt_has_the_same_bits_as_one_that_stayed(
    model: str, kv_type: str, attention: str | Tidal
) -> None:
    options = {"memory": "4GiB", "context": 1024, "threads": 1}
    options |= {"kv_type": kv_type, "attention": attention}
    with Runtime.open(model, **options) as stayed:  # type: ignore[arg-type]
        expected, logits = _turns(stayed, None)
    with Runtime.open(model, **options, prefix_cache="64MiB") as left:  # type: ignore[arg-type]
        results, same_logits = _turns(left, OTHER)
        # What the policy had chosen, and which tokens are exact, comes from the state, too.
        assert left._session.exact_until == stayed._session.exact_until
    assert same_logits == logits
    for found, original in zip(results, expected, strict=True):
        assert found.token_ids == original.token_ids
        assert (
            found.stats.restored_tokens == found.stats.reused_tokens == original.stats.reused_tokens
        )
        assert found.stats.reused_tokens > 30
        assert original.stats.restored_tokens == 0


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small weights and a large cache, 16 KiB a token: many bytes are kept in little time."""
    path = tmp_path_factory.mktemp("model") / "wide.gguf"
    return write_model(
        path, layers=8, width=512, heads=8, kv_heads=8, feed_forward=64, context=1024
    )


_ALTERNATE = """
import json
from lowtide import Runtime
from lowtide.memory.units import MIB
from lowtide.runtime.planning.plan import LoadConfig, plan_reference
options = dict(context=1024, kv_type="f16", threads=1)
without = plan_reference({path!r}, LoadConfig(memory="4GiB", **options)).plan.total_bytes
budget = int((without + {room_bytes}) / 0.95) + 1
with Runtime.open({path!r}, memory=budget, prefix_cache="50MiB", **options) as runtime:
    restored, trims = [], []
    for letter in "abcabcab":
        result = runtime.generate(letter * 1000, max_tokens=4, temperature=0)
        restored.append(result.stats.restored_tokens)
        trims += result.stats.trims
    plan = runtime.plan
    cached_bytes = runtime._engine.prefixes.num_bytes
print(json.dumps([budget, plan.total_bytes, cached_bytes, restored, len(trims), plan.downgrades]))
"""


@pytest.mark.skipif(
    not can_use_demand_zero(), reason="this system allocates the whole cache at once"
)
@pytest.mark.parametrize(("room", "num_snapshots"), [(55, 3), (35, 2), (10, 0)])
def test_the_peak_stays_under_a_tight_budget(
    wide_model: Path, room: int, num_snapshots: int
) -> None:
    """A second copy of a snapshot would be 15 MiB more, which no plan has."""
    done = run_python(_ALTERNATE.format(path=str(wide_model), room_bytes=room * MIB))
    assert done.code == 0, done.stderr
    budget, planned, cached_bytes, restored, num_trims, downgrades = json.loads(done.stdout)
    assert done.peak_bytes <= planned <= budget
    assert planned - done.peak_bytes < 15 * MIB + (min(room, 50) * MIB - cached_bytes)
    assert cached_bytes // (15 * MIB) == num_snapshots and cached_bytes <= min(room, 50) * MIB
    # Three prompts alternate: one is in the KV cache, the others are stored where there is room.
    assert any(restored) is (num_snapshots > 1)
    if num_snapshots == 3:
        assert [tokens > 900 for tokens in restored] == [False] * 3 + [True] * 5
    assert num_trims == 0
    assert bool(downgrades) is (room < 50)


def test_storing_takes_the_snapshots_bytes_and_restoring_none(wide_model: Path) -> None:
    done = run_python(
        "from lowtide import Runtime\n"
        "from lowtide.memory.process import read_process_memory as read\n"
        f"with Runtime.open({str(wide_model)!r}, memory='4GiB', context=1024, threads=1,\n"
        "        prefix_cache='50MiB') as runtime:\n"
        "    runtime.generate('b' * 1000, max_tokens=2)\n"
        "    runtime.generate('a' * 1000, max_tokens=2)\n"
        "    session, cache = runtime._session, runtime._engine.prefixes\n"
        "    before, held = read().peak_bytes, cache.num_bytes\n"
        "    prompt = [*cache._prefixes[0].token_ids, 5]\n"
        "    print(session.restore(prompt), cache.num_bytes - held, read().peak_bytes - before)"
    )
    assert done.code == 0, done.stderr
    restored, cached_bytes, grown = done.stdout.split()
    assert restored == "True" and int(cached_bytes) > 15 * MIB
    assert int(grown) < int(cached_bytes) + MIB


def test_a_chat_that_starts_over_is_restored(smollm2: Path) -> None:
    """As a user does it: a system message, another one, and the first one again."""
    system = "You are a sailor who answers in one short sentence. " * 6
    lines = [f"/system {system}", "Hello.", "/system You count.", "Count.", f"/system {system}"]
    done = run_lowtide(
        *("chat", str(smollm2), "--memory", "300MiB", "-c", "1024", "-t", "1", "--temp", "0"),
        *("-n", "8", "--prefix-cache", "24MiB"),
        stdin="\n".join([*lines, "Hello."]).encode(),
    )
    assert done.code == 0, done.stderr
    first, _, again = done.stdout.splitlines()
    assert first == again
    assert done.stderr.count("(from the prefix cache)") == 1
    assert done.peak_bytes <= 300 * MIB
