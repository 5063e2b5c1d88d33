"""Profile a program that embeds lowtide: its own work and the model's, in one timeline.

Run it: python examples/profile_embedding.py [TRACE.json]        (open the trace in ui.perfetto.dev)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lowtide import Profiler, Runtime
from lowtide.runtime.profiling.export import chrome_trace

NOTES = {
    "harbour": "The harbour has forty boats. The ferry leaves at nine.",
    "museum": "The museum opens at ten. Tickets cost four euros.",
}


def answer(runtime: Runtime, profiler: Profiler, topic: str, question: str) -> str:
    """Answer a question from the notes; the program's own step has a span of its own."""
    with profiler.span("find notes"):
        content = f"{NOTES[topic]}\n{question}"
    chunks = runtime.chat([{"role": "user", "content": content}], max_tokens=24, temperature=0)
    return "".join(chunk.text for chunk in chunks)


def main(trace: str | None = None) -> None:
    """Answer two questions and print where bytes and seconds went."""
    profiler = Profiler()
    with Runtime.open(memory="400MiB", attention="dense", profiler=profiler) as runtime:
        print(answer(runtime, profiler, "harbour", "When does the ferry leave?"))
        print(answer(runtime, profiler, "museum", "When does the museum open?"))

    report = profiler.report().to_dict()  # the keys are those of `lowtide profile --json`
    print(f"\npeak {report['peak_rss_bytes'] >> 20} MiB")
    for line in report["measured"]:
        print(f"{line['component']:<28} {(line['bytes'] or 0) / 2**20:8.1f} MiB")
    for phase in report["phases"]:
        print(f"{phase['name']:<28} {phase['seconds'] * 1000:8.1f} ms")
    if trace is not None:
        Path(trace).write_text(json.dumps(chrome_trace(profiler.report())))


if __name__ == "__main__":
    main(*sys.argv[1:])
