"""Chat in the terminal inside a memory budget.

Run it: python examples/chat.py [BUDGET]        (each line is a turn; an empty line or Ctrl-D ends)
"""

from __future__ import annotations

import sys

from lowtide import LowtideError, Runtime


def main(budget: str) -> None:
    """Answer each line of standard input, with the conversation so far."""
    with Runtime.open(memory=budget, attention="dense") as runtime:
        plan = runtime.plan
        print(f"planned {plan.total_bytes >> 20} MiB, context {plan.context:,} tokens")
        messages: list[dict[str, str]] = []
        for line in iter(lambda: sys.stdin.readline().strip(), ""):
            messages.append({"role": "user", "content": line})
            answer = ""
            for chunk in runtime.chat(messages, max_tokens=64, temperature=0):
                print(chunk.text, end="", flush=True)
                answer += chunk.text
            messages.append({"role": "assistant", "content": answer})
            # Only the new turn was computed: the rest was in the KV cache.
            stats = chunk.stats
            print(f"\n[{stats.prompt_tokens} prompt tokens, {stats.reused_tokens} reused]")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:] or ["400MiB"])
    except LowtideError as error:  # one sentence that says what to change
        sys.exit(f"Error: {error}")
