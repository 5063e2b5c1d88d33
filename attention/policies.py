"""The policies by the names that people type: "llama", "dense", "tidal", "tidal:k=512,layers=2+13"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowtide.attention.dense import Dense, Llama
from lowtide.attention.policy import AttentionPolicy
from lowtide.attention.tidal import Tidal
from lowtide.models.errors import BadOption

POLICY_NAMES = ("llama", "dense", "tidal")
TIDAL_SETTINGS = (
    "k", "layers", "dense_layers", "sinks", "recent", "refresh", "min_context", "correction",
    "calibration",
)  # fmt: skip


def parse_policy(text: str | AttentionPolicy) -> AttentionPolicy:
    """Return the policy that `text` names; raises `BadOption` that names what is wrong."""
    if isinstance(text, AttentionPolicy):
        return text
    name, _, settings = text.partition(":")
    if name == "tidal":
        return Tidal(**dict(_setting(part) for part in settings.split(",") if part))
    if name not in POLICY_NAMES:
        raise BadOption(f"attention is {name!r}, one of {', '.join(POLICY_NAMES)} is wanted")
    if settings:
        raise BadOption(f"attention is {text!r}: {name} has no settings")
    return Llama() if name == "llama" else Dense()


def _setting(part: str) -> tuple[str, Any]:
    name, _, value = part.partition("=")
    if name not in TIDAL_SETTINGS:
        raise BadOption(
            f"tidal has no setting {name!r}, it has {', '.join(TIDAL_SETTINGS)}: write tidal:k=512"
        )
    readers: dict[str, Callable[[str], Any]] = {
        "k": _read_k,
        "layers": _read_layers,
        "calibration": Path,
    }
    read = readers.get(name, int)
    try:
        return {"layers": "selection_layers"}.get(name, name), read(value)
    except ValueError:
        wanted = {"k": "tokens or a percentage", "layers": "layer numbers joined by +"}
        raise BadOption(
            f"tidal's {name} is {value!r}, {wanted.get(name, 'a whole number')} is wanted"
        ) from None


def _read_k(text: str) -> int | float:
    if not text.endswith("%"):
        return int(text)
    share = float(text[:-1]) / 100
    if not 0 < share <= 1:
        raise ValueError
    return min(share, 0.999999)  # 1 would be one token; all of the context is dense in any case


def _read_layers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("+")))
