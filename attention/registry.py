"""The policies that `--attention` and `Runtime.open(attention=...)` know by name."""

from __future__ import annotations

from lowtide.attention.delta.policy import Delta
from lowtide.attention.dense import Dense, Llama
from lowtide.attention.gem.policy import Gem
from lowtide.attention.policy import AttentionPolicy, CalibratedPolicy
from lowtide.attention.tidal.policy import Tidal
from lowtide.models.arguments.names import option
from lowtide.models.arguments.values import shown
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec

_CLASSES: tuple[type[AttentionPolicy], ...] = (
    Llama,
    Dense,
    Tidal,
    Delta,
    Gem,
)
POLICIES = {policy.name: policy for policy in _CLASSES}


def parse_policy(text: str | AttentionPolicy) -> AttentionPolicy:
    """Return the policy that `text` names, as in "tidal:k=512,layers=2+13"; a policy is returned itself.

    Raises `BadOption` for an unknown name or a bad setting.
    """
    if isinstance(text, AttentionPolicy):
        return text
    name, _, settings = text.partition(":") if isinstance(text, str) else (text, "", "")
    if not isinstance(name, str) or name not in POLICIES:
        raise BadOption(
            f"{option('attention')} is {shown(name)}; it must be one of {', '.join(POLICIES)}"
        )
    return POLICIES[name].parse(settings)


def calibrated_policies(
    spec: ModelSpec, prompt_tokens: int, num_tokens: int
) -> list[CalibratedPolicy]:
    """Return every policy that is calibrated for the model; see `AttentionPolicy.calibrated`."""
    return [
        found for policy in _CLASSES for found in policy.calibrated(spec, prompt_tokens, num_tokens)
    ]
