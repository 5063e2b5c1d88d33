"""The policies by the names that people type: "llama", "dense", "tidal", "tidal:k=512,layers=2+13"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowtide.attention.delta.blocks import DeltaBlocks
from lowtide.attention.delta.tokens import Delta
from lowtide.attention.dense import Dense, Llama
from lowtide.attention.gem.policy import Gem
from lowtide.attention.policy import AttentionPolicy
from lowtide.attention.tidal.policy import Tidal
from lowtide.models.errors import BadOption

SETTINGS: dict[str, tuple[str, ...]] = {
    "llama": (),
    "delta": (
        *("sparsity", "window", "sinks", "prompts", "refine", "store", "calibration"),
        *("granularity", "block", "threshold"),
    ),
    "dense": ("prompts",),
    "gem": (
        *("k", "layer", "then", "min_prompt", "rows", "weights", "heads", "pool", "pool_size"),
        *("first", "last", "continues", "calibration"),
    ),
    "tidal": (
        *("k", "layers", "dense_layers", "sinks", "recent", "refresh", "min_context"),
        *("correction", "prompts", "calibration"),
    ),
}
_OF_BLOCKS, _OF_ROWS = ("block", "threshold"), ("store",)


def _delta(*, granularity: str = "row", **settings: Any) -> Delta | DeltaBlocks:
    """Return delta of a granularity; settings that are another one's are a mistake."""
    is_row = granularity == "row"
    others = [name for name in (_OF_BLOCKS if is_row else _OF_ROWS) if name in settings]
    if others:
        fitting = "granularity=block" if is_row else "granularity=row"
        raise BadOption(
            f"delta's {others[0]} is given and its granularity is {granularity}: leave {others[0]} out, or "
            f"say {fitting}"
        )
    return Delta(**settings) if is_row else DeltaBlocks(granularity=granularity, **settings)


_POLICIES: dict[str, Callable[..., AttentionPolicy]] = {
    "llama": Llama,
    "delta": _delta,
    "dense": Dense,
    "gem": Gem,
    "tidal": Tidal,
}


def parse_policy(text: str | AttentionPolicy) -> AttentionPolicy:
    """Return the policy that `text` names; raises `BadOption` that names what is wrong."""
    if isinstance(text, AttentionPolicy):
        return text
    name, _, settings = text.partition(":")
    if name not in SETTINGS:
        raise BadOption(f"attention is {name!r}, one of {', '.join(SETTINGS)} is wanted")
    return _POLICIES[name](**dict(_setting(name, part) for part in settings.split(",") if part))


def _setting(policy: str, part: str) -> tuple[str, Any]:
    name, _, value = part.partition("=")
    known = SETTINGS[policy]
    if name not in known:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise BadOption(f"{policy} has no setting {name!r}, {has}: write tidal:k=512")
    readers: dict[str, Callable[[str], Any]] = {
        "k": _read_k,
        "layers": _read_layers,
        "prompts": str,
        **dict.fromkeys(("sparsity", "refine"), _read_share),
        "threshold": float,
        "granularity": str,
        **dict.fromkeys(("weights", "heads", "pool"), str),
        "then": parse_policy,
        "calibration": Path,
    }
    try:
        return {"layers": "selection_layers"}.get(name, name), readers.get(name, int)(value)
    except ValueError:
        wanted = {
            "k": "tokens or a percentage",
            "layers": "layer numbers joined by +",
            "then": "dense or tidal",
            **dict.fromkeys(("sparsity", "refine"), "a share or a percentage"),
            "threshold": "a number",
        }
        raise BadOption(
            f"{policy}'s {name} is {value!r}, {wanted.get(name, 'a whole number')} is wanted"
        ) from None


def _read_k(text: str) -> int | float:
    if not text.endswith("%"):
        return int(text)
    share = float(text[:-1]) / 100
    if not 0 < share <= 1:
        raise ValueError
    return min(share, 0.999999)  # 1 would be one token; all of the context is dense in any case


def _read_share(text: str) -> float:
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def _read_layers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("+")))
