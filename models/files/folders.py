"""Where lowtide's own files lie: the cache (files that can be made again) and the state (the chat's history).

The folders follow the XDG Base Directory specification. A service or a container may have neither a home nor a
folder that it may write to: then there is no cache and no history, and everything else works.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

CACHE_VARIABLE, STATE_VARIABLE = "XDG_CACHE_HOME", "XDG_STATE_HOME"


def cache_folder() -> Path | None:
    """Return $XDG_CACHE_HOME/lowtide or ~/.cache/lowtide; None for a user without a home. It may not exist."""
    return _folder(CACHE_VARIABLE, ".cache")


def state_folder() -> Path | None:
    """Return $XDG_STATE_HOME/lowtide or ~/.local/state/lowtide; None for a user without a home."""
    return _folder(STATE_VARIABLE, ".local/state")


def home_folder() -> Path | None:
    """Return the user's home; None where neither HOME nor the system's list of users has an absolute path."""
    home = os.environ.get("HOME", "")
    if not os.path.isabs(home):
        home = _listed_home()
    return Path(home) if os.path.isabs(home) else None


def unusable(folder: Path | None, variable: str) -> str | None:
    """Return why files cannot be written to `folder`, and what to set; None if they can be.

    The folder is made if it does not exist.
    """
    if folder is None:
        return f"this user has no home folder: set {variable} to a folder that can be written"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return f"{folder} cannot be written ({reason}): set {variable} to a folder that can be"


def _folder(variable: str, below_home: str) -> Path | None:
    base = os.environ.get(variable, "")
    if os.path.isabs(base):  # the specification has relative paths ignored
        return Path(base) / "lowtide"
    home = home_folder()
    return home / below_home / "lowtide" if home is not None else None


def _listed_home() -> str:
    try:
        import pwd

        return pwd.getpwuid(os.getuid()).pw_dir
    except (ImportError, KeyError):  # no such list, or a user that is not in it
        return ""
