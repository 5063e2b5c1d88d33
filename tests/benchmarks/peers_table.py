"""Write the table of docs/benchmarks.md from the JSON files of `make bench-peers`: PYTHON peers_table.py FILE..."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- table of make bench-peers -->", "<!-- end of the table -->"
COLUMNS = "| model, tokens | engine | prompt, tokens/s | lowtide | decode, tokens/s | lowtide | peak MiB |"


def spread(ratios: list[float]) -> str:
    """Return a median ratio with the smallest and the largest of the rounds."""
    return f"{statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f})"


def row(line: dict[str, Any]) -> str:
    """Return one row: an engine's speeds, and how many times as fast lowtide is."""
    is_own = line["engine"] == "lowtide"
    ratios = ["" if is_own else spread(line[f"{what}_ratios"]) for what in ("prompt", "decode")]
    cells = (
        f"{line['model']}, {line['tokens']:,}", line["engine"],
        f"{line['prompt_tokens_per_s']:,.0f}", ratios[0],
        f"{line['decode_tokens_per_s']:.0f}", ratios[1], f"{line['peak_bytes'] / 2**20:,.0f}",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def table(files: list[dict[str, Any]]) -> str:
    """Return the table, under a line with the machine."""
    cpu = files[0]["machine_info"]["cpu"]
    lines = [
        line
        for file in files
        for run in file["benchmarks"]
        for line in run["extra_info"].get("peers", ())
    ]
    machine = f"{cpu['count']} cores of {cpu['brand_raw']} (family {cpu['family']}, model {cpu['model']})."
    return "\n".join([machine, "", COLUMNS, "| --- " * 7 + "|", *map(row, lines)])


def with_table(page: str, text: str) -> str:
    """Return the page with another table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


if __name__ == "__main__":
    found = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    PAGE.write_text(with_table(PAGE.read_text(), table(found)))
