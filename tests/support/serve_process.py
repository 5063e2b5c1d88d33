"""`lowtide serve` as a process of its own, as typed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RUN = "from lowtide.cli.main import run; run()"


class Process:
    """`lowtide serve` on a free port."""

    def __init__(self, model: Path, *arguments: str) -> None:
        command = [sys.executable, "-c", RUN, "serve", str(model), "--port", "0", *arguments]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        self.lines: list[str] = []
        for line in self._process.stderr:
            self.lines.append(line)
            found = re.search(r"listening on (http://\S+)", line)
            if found:
                break
        else:
            raise AssertionError("".join(self.lines))
        self.url = found[1]
        self._reading = threading.Thread(target=self.lines.extend, args=(self._process.stderr,))
        self._reading.start()

    @property
    def peak_bytes(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) << 10

    def post(self, path: str, body: Any, *, timeout: float = 120) -> tuple[int, bytes]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except TimeoutError:
            return 0, b""

    def json(self, path: str, body: Any) -> Any:
        """Post a request that is answered with JSON and status 200."""
        status, data = self.post(path, body)
        assert status == 200, data
        return json.loads(data)

    def status(self) -> Any:
        with urllib.request.urlopen(self.url + "/status", timeout=30) as reply:
            return json.loads(reply.read())

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        self._process.send_signal(signal_number)
        return self._process.wait(30)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reading.join()
        assert self._process.stderr is not None
        self._process.stderr.close()


@contextmanager
def started(model: Path, *arguments: str) -> Iterator[Process]:
    process = Process(model, *arguments)
    try:
        yield process
    finally:
        process.end()
