"""Compare the plans of one model for several budgets, without loading it.

Run it: python examples/plan.py [MODEL]
"""

from __future__ import annotations

import sys

from lowtide.runtime.planning.plan import LoadConfig, plan_reference

BUDGETS = ("100MiB", "200MiB", "400MiB", "2GiB")


def main(model: str | None = None) -> None:
    """Print one row per budget: what fits, and what was made smaller."""
    print(f"{'budget':>8} {'planned':>9} {'context':>8} {'KV type':>8}  downgrades")
    for budget in BUDGETS:
        plan = plan_reference(model, LoadConfig(memory=budget)).plan
        fits = f"{plan.total_bytes >> 20} MiB" if plan.fits else "refused"
        names = ", ".join(step.partition(":")[0] for step in plan.downgrades) or "none"
        print(f"{budget:>8} {fits:>9} {plan.context:>8,} {plan.kv_type:>8}  {names}")
    print("\nThe last plan, line by line:\n")
    print(plan)


if __name__ == "__main__":
    main(*sys.argv[1:])
