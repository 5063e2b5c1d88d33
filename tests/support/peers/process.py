"""A process with one engine, which answers when it is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent.parent
PEERS = SUPPORT.parent.parent / "build" / "peers" / "bin" / "python"
OWN = ("own", "llama")
"""Engines that run in the tests' environment; others run in that of `make bench-peers`."""


class NotOpened(Exception):
    """An engine that is not installed, or does not open a model: why."""


class PeerProcess:
    """One worker of tests/support/peers/worker.py."""

    def __init__(self, command: list[str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": str(SUPPORT)},
        )

    def read(self) -> str:
        """Return its next line; raise NotOpened with its last words where it ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return line
        self._errors.seek(0)
        words = self._errors.read().strip().splitlines() or ["it ended without a word"]
        raise NotOpened(words[-1][:300])

    def answer(self, token_ids: list[int], tokens: int) -> dict[str, float]:
        """Read a prompt, decode, and return what it took."""
        assert self._process.stdin is not None
        print(json.dumps({"token_ids": token_ids, "tokens": tokens}), file=self._process.stdin)
        self._process.stdin.flush()
        found: dict[str, float] = json.loads(self.read())
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()


def opened(engine: str, model: Path, context: int) -> PeerProcess:
    """Start an engine and wait until its model is open."""
    python = sys.executable if engine in OWN else str(PEERS)
    if not Path(python).exists():
        raise NotOpened("`make bench-peers` installs it")
    process = PeerProcess([python, "-m", "peers.worker", engine, str(model), str(context)])
    try:
        while process.read().strip() != "ready":
            pass
    except NotOpened:
        process.close()
        raise
    return process
