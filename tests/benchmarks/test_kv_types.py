"""Quantised KV caches with the delta policy, compared with dense attention over an fp16 cache.

SmolLM2, with the text and the passkeys of `test_delta_quality.py`. Groups are stored in fp16 for every type
of the cache; over a quantised cache they are groups of quantised keys. Run with `make bench`; takes minutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from held_essays import Essays
from numpy.typing import NDArray

from lowtide.attention.delta.policy import Delta
from lowtide.attention.evaluation.divergence import extend, log_softmax
from lowtide.attention.policy import PassController
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

pytestmark = pytest.mark.benchmark

DEPTH = 7600
SPARSITY = 0.5
KV_COMPONENTS = ("KV cache", "attention scratch")


@dataclass(frozen=True, slots=True)
class Read:
    """Log probabilities of the next tokens, (places * SCORED, vocabulary), and which passkeys were found.

    A passkey is found if each of its tokens is the top-1 token after the ones before it.
    """

    log_probs: NDArray[np.float32]
    keys: list[bool]


def read(held: Essays, policy: Delta | None) -> Read:
    """Read the text at every place and answer every passkey; a policy of None is dense attention."""
    controller = held.dense if policy is None else held.controller(policy)
    prefix = held.trial.prefix
    log_probs = [
        _log_probs(held, controller, text[:prefix], text[prefix:-1]) for text in held.texts()
    ]
    keys = []
    for passkey in held.passkeys():
        *prompt, last = passkey.token_ids
        answered = _log_probs(held, controller, prompt, [last, *passkey.answer_ids[:-1]])
        keys.append(answered.argmax(1).tolist() == list(passkey.answer_ids))
    return Read(np.concatenate(log_probs), keys)


def _log_probs(
    held: Essays, controller: PassController, prompt: list[int], token_ids: list[int]
) -> NDArray[np.float32]:
    """Return log probabilities after each of the tokens, (tokens, vocabulary), which follow the prompt."""
    model, rows = held.loaded.model, []
    model.truncate(0)
    extend(model, controller, prompt)
    for token_id in token_ids:
        controller.begin_decode()
        rows.append(log_softmax(model.forward((token_id,))))
    return np.stack(rows)


def planned_bytes(path: Path, policy: Delta | None, kv_type: str) -> int:
    """Return the planned bytes of the KV cache and the attention scratch at `DEPTH` tokens."""
    options = LoadConfig(
        memory="8GiB", context=DEPTH, threads=1, kv_type=kv_type, attention=policy or "dense"
    )
    rows = plan_reference(path, options).plan.rows
    return sum(row.num_bytes for row in rows if row.component in KV_COMPONENTS)


def divergence(base: Read, found: Read) -> float:
    """Return the KL divergence of the next tokens, in nats/token."""
    return float(
        (np.exp(base.log_probs) * (base.log_probs - found.log_probs))
        .sum(1, dtype=np.float64)
        .mean()
    )


def losses(smollm2: Path) -> dict[tuple[str, bool], float]:
    """Print and return the divergence of each type with dense attention and with groups."""
    base: Read | None = None
    spread: Delta | None = None
    found = dict[tuple[str, bool], float]()
    whole = planned_bytes(smollm2, None, "f16")
    for kv_type in ("f16", "q8_0", "q4_0"):
        with Essays.open(smollm2, Delta(), kv_type=kv_type) as held:
            spread = spread or held.of_sparsity(Delta(), SPARSITY)
            for policy in (None, spread):
                result = read(held, policy)
                base = base or result
                share = planned_bytes(smollm2, policy, kv_type) / whole
                same = sum(a and b for a, b in zip(base.keys, result.keys, strict=True))
                found[kv_type, policy is not None] = kl = divergence(base, result)
                print(
                    f"\n{kv_type}, {policy or 'dense'}: KL {kl:.4f}, passkeys {same} of "
                    f"{sum(base.keys)}, {share:.2f} of the planned bytes"
                )
    return found


def test_quantised_caches_beside_delta(benchmark: Any, smollm2: Path) -> None:
    found = benchmark.pedantic(lambda: losses(smollm2), rounds=1)
    assert found["q8_0", False] < found["f16", True] < found["q4_0", False]
