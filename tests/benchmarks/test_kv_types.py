"""Quantised caches beside delta: what is lost against dense attention over a cache of halves.

SmolLM2; the text and the keys of `test_delta_quality.py`. Groups are halves whatever the cache's type:
over a quantised cache they are groups of quantised keys, and its type saves bytes in the window alone.
Run with `make bench`; takes minutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from held_essays import Essays
from numpy.typing import NDArray

from lowtide.attention.delta.tokens import Delta
from lowtide.attention.evaluation.divergence import extend, log_softmax
from lowtide.attention.policy import PassController
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

pytestmark = pytest.mark.benchmark

DEPTH = 7600
SPARSITY = 0.5
KEPT_ROWS = ("KV cache", "attention scratch")


@dataclass(frozen=True, slots=True)
class Read:
    """Next tokens' log probabilities, (places * SCORED, vocabulary), and which keys were answered.

    That is where each token of the key is the likeliest one behind those before it.
    """

    says: NDArray[np.float32]
    keys: list[bool]


def read(held: Essays, policy: Delta | None) -> Read:
    """Read every place and answer every key; None is dense attention."""
    controller = held.dense if policy is None else held.controller(policy)
    prefix = held.trial.prefix
    says = [_says(held, controller, text[:prefix], text[prefix:-1]) for text in held.texts()]
    keys = []
    for passkey in held.passkeys():
        *prompt, last = passkey.token_ids
        answered = _says(held, controller, prompt, [last, *passkey.answer_ids[:-1]])
        keys.append(answered.argmax(1).tolist() == list(passkey.answer_ids))
    return Read(np.concatenate(says), keys)


def _says(
    held: Essays, controller: PassController, prompt: list[int], token_ids: list[int]
) -> NDArray[np.float32]:
    """Return log probabilities behind each of the tokens, (tokens, vocabulary), after the prompt."""
    model, rows = held.loaded.model, []
    model.truncate(0)
    extend(model, controller, prompt)
    for token_id in token_ids:
        controller.begin_decode()
        rows.append(log_softmax(model.forward((token_id,))))
    return np.stack(rows)


def planned_bytes(path: Path, policy: Delta | None, kv_type: str) -> int:
    """What the plan has for the cache, what replaces it and the kernels' scratch, at `DEPTH` tokens."""
    options = LoadConfig(
        memory="8GiB", context=DEPTH, threads=1, kv_type=kv_type, attention=policy or "dense"
    )
    rows = plan_reference(path, options).plan.rows
    return sum(row.num_bytes for row in rows if row.component in KEPT_ROWS)


def divergence(base: Read, found: Read) -> float:
    """KL of the next tokens, nats a token."""
    return float((np.exp(base.says) * (base.says - found.says)).sum(1, dtype=np.float64).mean())


def losses(smollm2: Path) -> dict[tuple[str, bool], float]:
    """Print what each type loses with dense attention and with groups, and return the divergences."""
    base: Read | None = None
    spread: Delta | None = None
    found = dict[tuple[str, bool], float]()
    whole = planned_bytes(smollm2, None, "f16")
    for kv_type in ("f16", "q8_0", "q4_0"):
        with Essays.opened(smollm2, Delta(), kv_type=kv_type) as held:
            spread = spread or held.of_sparsity(Delta(), SPARSITY)
            for policy in (None, spread):
                seen = read(held, policy)
                base = base or seen
                share = planned_bytes(smollm2, policy, kv_type) / whole
                kept = sum(a and b for a, b in zip(base.keys, seen.keys, strict=True))
                found[kv_type, policy is not None] = apart = divergence(base, seen)
                print(
                    f"\n{kv_type}, {policy or 'dense'}: KL {apart:.4f}, pass keys {kept} of "
                    f"{sum(base.keys)}, {share:.2f} of the planned bytes"
                )
    return found


def test_quantised_caches_beside_delta(benchmark: Any, smollm2: Path) -> None:
    found = benchmark.pedantic(lambda: losses(smollm2), rounds=1)
    assert found["q8_0", False] < found["f16", True] < found["q4_0", False]
