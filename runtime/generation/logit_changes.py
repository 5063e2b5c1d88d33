"""What sampling parameters add to logits: biases by token, and penalties of tokens that were sampled before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lowtide.runtime.options import SamplingParams

if TYPE_CHECKING:
    from lowtide.models.model import Logits


def changed_logits(
    logits: Logits, params: SamplingParams, history: Sequence[int], num_prompt: int
) -> Logits:
    """Return the logits with the biases and penalties of `params`: a changed copy, or the same where there are none.

    The repeat penalty looks back on all of `history`. Frequency and presence penalties count what was sampled, which
    is behind the first `num_prompt` tokens: token j loses `frequency_penalty` for each time, and `presence_penalty`
    once.
    """
    repeats = params.repeat_penalty != 1 and params.repeat_last_n > 0 and len(history) > 0
    counts = bool(params.frequency_penalty or params.presence_penalty)
    counts = counts and len(history) > num_prompt
    if not (params.logit_bias or repeats or counts):
        return logits
    changed = logits.copy()
    for token_id, bias in params.logit_bias:
        changed[token_id] += bias
    if repeats:
        # np.unique would import numpy.ma, which takes 6 ms and a megabyte.
        recent = np.array(sorted(set(history[-params.repeat_last_n :])))
        values, penalty = changed[recent], params.repeat_penalty
        changed[recent] = np.where(values > 0, values / penalty, values * penalty)
    if counts:
        times = Counter(history[num_prompt:])
        sampled = np.fromiter(times.keys(), np.int64, len(times))
        each = np.fromiter(times.values(), np.float32, len(times))
        changed[sampled] -= each * params.frequency_penalty + params.presence_penalty
    return changed
