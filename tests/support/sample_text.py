"""A text to decode in tests: Python source, in a file of its own so that its tokens never change."""

from __future__ import annotations

from pathlib import Path


def sample_text() -> str:
    """Return some 14,000 characters."""
    return Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
