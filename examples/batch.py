"""Continue several prompts together: one forward pass per step computes a token of each.

Run it: python examples/batch.py
"""

from __future__ import annotations

import time

from lowtide import Runtime, SamplingParams

PROMPTS = ("The sea is", "The moon is", "The sun is", "The wind is")


def main() -> None:
    """Generate one prompt after the other, then all together, and compare."""
    params = SamplingParams(max_tokens=24, temperature=0)
    with Runtime.open(memory="600MiB", context=1024, attention="dense") as runtime:
        started = time.perf_counter()
        alone = [runtime.generate(prompt, params) for prompt in PROMPTS]
        between = time.perf_counter()
        together = runtime.generate_batch(PROMPTS, params)
        ended = time.perf_counter()

    for prompt, result in zip(PROMPTS, together, strict=True):
        print(prompt + result.text.replace("\n", " "))
    same = [result.token_ids for result in alone] == [result.token_ids for result in together]
    batch = together[0].stats.batch
    assert batch is not None
    print(f"\none by one {between - started:.2f} s, together {ended - between:.2f} s")
    print(f"same tokens: {same}; guaranteed: {batch['identical']} {batch['nondeterminism'] or ''}")


if __name__ == "__main__":
    main()
