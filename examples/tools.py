"""Let a model call functions of Python.

Run it: python examples/tools.py [QUESTION]        (each call is shown before it runs)
"""

from __future__ import annotations

import sys
from typing import Literal

from lowtide import LowtideError, Runtime, run_tools


def tide(harbour: Literal["Brest", "Dover", "Hamburg"], day: Literal["today", "tomorrow"]) -> str:
    """Return the time of high tide at a harbour.

    Args:
        harbour: where
        day: when
    """
    hours = {"Brest": 6, "Dover": 11, "Hamburg": 3}[harbour] + (day == "tomorrow")
    return f"High tide at {harbour} {day} is at {hours}:30."


def main(question: str) -> None:
    """Answer a question with the function; the first answer must call it."""
    with Runtime.open(memory="400MiB", context=1024, structured=True) as runtime:
        done = run_tools(
            runtime,
            question,
            [tide],
            tool_choice="required",
            allow=lambda call: print("calls", call.name, call.arguments) is None,
            max_tokens=64,
            temperature=0,
        )
        for message in done.messages:
            print(f"{message['role']}: {message['content']}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:] or ["When is high tide at Dover tomorrow?"])
    except LowtideError as error:  # one sentence that says what to change
        sys.exit(f"Error: {error}")
