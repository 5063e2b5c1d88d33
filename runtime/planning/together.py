"""Whether a planned model can compute several sequences in one pass, known before anything is loaded."""

from __future__ import annotations

from lowtide.models.arguments.names import option
from lowtide.models.errors import BadOption
from lowtide.runtime.backends.backend import ResolvedModel


def require_together(planned: ResolvedModel, what: str) -> None:
    """Raise `BadOption` where the model or its attention runs one sequence at a time.

    `what` says what has several, such as "a batch of 3 prompts".
    """
    spec, policy = planned.spec, planned.policy
    reason = planned.backend.why_one_sequence(spec)
    if reason is not None:
        raise BadOption(
            f"{spec.name} cannot run {what}: it computes one sequence at a time ({reason}); pass one prompt after "
            "another"
        )
    if not policy.supports_batch:
        raise BadOption(
            f"{policy.name} cannot run {what}: it selects or filters the keys of one sequence; set "
            f"{option('attention', 'dense')} or {option('attention', 'llama')}, or pass one prompt after another"
        )
