"""Answer several questions together from asyncio: each is submitted when it comes, and read as it is written.

Run it: python examples/submit.py
"""

from __future__ import annotations

import asyncio

from lowtide import Runtime

QUESTIONS = ("Why is the sea salty?", "What makes the tide?", "Name three kinds of boat.")


async def answer(runtime: Runtime, number: int, question: str) -> int:
    """Ask a question after a moment, and print its answer."""
    await asyncio.sleep(number / 10)
    messages = [{"role": "user", "content": question}]
    submission = runtime.submit(messages, max_tokens=24, temperature=0)
    text = ""
    async for chunk in submission:
        text += chunk.text
    print(f"{question} {text}".replace("\n", " "))
    return chunk.stats.generated_tokens


async def main() -> None:
    """Open a runtime that computes four answers together, and ask it three questions."""
    with Runtime.open(memory="600MiB", context=1024, sequences=4) as runtime:
        asked = (answer(runtime, *one) for one in enumerate(QUESTIONS))
        counts = await asyncio.gather(*asked)
        print(f"{sum(counts)} tokens, {runtime.queue.tokens_per_s:.0f} each second")


if __name__ == "__main__":
    asyncio.run(main())
