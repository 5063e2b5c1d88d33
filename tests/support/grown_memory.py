"""How much a process grows by reading tokens, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROWS = 128
_PROGRAM = """
import json, sys
from lowtide.memory.process import read_process_memory
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference
path, attention, num_tokens, rows = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
planned = plan_reference(
    path, LoadConfig(attention=attention, memory="2GiB", context=num_tokens, threads=2)
)
made = Engine(planned)
made.controller.begin_prefill()
made.model.forward(range(1000, 1000 + rows))
made.model.truncate(0)
before = read_process_memory().resident_bytes
for at in range(0, num_tokens, rows):
    made.controller.begin_prefill()
    made.model.forward(range(1000, 1000 + min(rows, num_tokens - at)))
found = read_process_memory()
made.close()
print(json.dumps([found.resident_bytes - before, found.peak_bytes, planned.plan.total_bytes]))
"""


@dataclass(frozen=True, slots=True)
class Grown:
    """By how many bytes the process grew, and its peak beside what was planned."""

    num_bytes: int
    peak_bytes: int
    planned_bytes: int


def grown(path: Path, attention: str, num_tokens: int) -> Grown:
    """Read so many tokens with `attention`, in passes of 128, from an empty cache."""
    command = [sys.executable, "-c", _PROGRAM, str(path), attention, str(num_tokens), str(ROWS)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
    return Grown(*json.loads(found.stdout))
