"""Paths as callers pass them: text, bytes, or any `os.PathLike`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lowtide.models.arguments.values import shown
from lowtide.models.errors import BadOption
from lowtide.models.files.folders import home_folder

MOST_BYTES, MOST_NAME_BYTES = 4095, 255
"""The most that Linux opens."""


def user_path(name: str, value: Any) -> Path:
    """Return the path, with ~ as the user's home; raise `BadOption` where it is none.

    `name` is the option as `option` writes it. Whether something is there is not checked.
    """
    try:
        path = os.fsdecode(os.fspath(value))
    except Exception:  # not a path, or a caller's own class that fails
        raise BadOption(f"{name} is {shown(value)}; it must be a path") from None
    if not path:
        raise BadOption(f"{name} is empty; it must be a path")
    if "\0" in path:
        raise BadOption(f"{name} is {shown(path)}; a path has no NUL character")
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise BadOption(
            f"{name} is {shown(path)}, with a character that no path can have: pass the path as bytes"
        ) from None
    if len(encoded) > MOST_BYTES or max(map(len, encoded.split(b"/"))) > MOST_NAME_BYTES:
        raise BadOption(
            f"{name} is {shown(path)}, of {len(path):,} characters; a path has at most {MOST_BYTES:,} "
            f"bytes, and each name in it {MOST_NAME_BYTES}"
        )
    if path == "~" or path.startswith("~/"):
        home = home_folder()
        return Path(path) if home is None else home / path[2:]
    return Path(os.path.expanduser(path))  # ~name is another user's home, if there is one


def exists(path: Path) -> bool:
    """Whether something is at `path`; False for a path that the system refuses, such as one that is too long."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def shown_path(path: Path) -> str:
    """Return the path as a message shows it: in one line, with the middle of a long one left out."""
    text = str(path)
    if not text.isprintable():
        text = ascii(text)
    return text if len(text) <= 200 else f"{text[:100]}…{text[-60:]}"
