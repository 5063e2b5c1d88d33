"""What the server says of its model and of itself: plan, memory, queue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowtide.cli.server.service import Service
from lowtide.memory.process import read_process_memory


def model_values(service: Service) -> dict[str, Any]:
    """Return the model as OpenAI's list of models has it, and its size."""
    planned = service.runtime.planned
    return {
        "id": service.name,
        "object": "model",
        "created": service.started_at,
        "owned_by": "lowtide",
        "lowtide": {
            "name": planned.spec.name,
            "quantisation": planned.spec.quantisation,
            "context": planned.plan.context,
            "planned_bytes": planned.plan.total_bytes,
            "budget_bytes": planned.plan.budget.num_bytes,
        },
    }


def plan_bytes(service: Service) -> dict[str, int]:
    """Return the bytes of the plan by component."""
    return {line.component: line.num_bytes for line in service.runtime.plan.rows}


def status_gauges(service: Service) -> Mapping[str, tuple[str, float | Mapping[str, float]]]:
    """Return the gauges of the metrics."""
    memory, plan, queue = read_process_memory(), service.runtime.plan, service.runtime.queue
    return {
        "queue_waiting": ("Answers that wait.", queue.waiting),
        "queue_running": ("Answers that are computed.", queue.running),
        "queue_sequences": ("Answers that may be computed together.", queue.sequences),
        "tokens_per_second": ("Tokens of all answers in the last seconds.", queue.tokens_per_s),
        "memory_budget_bytes": ("The budget.", plan.budget.num_bytes),
        "memory_resident_bytes": ("Resident set of the process.", memory.resident_bytes),
        "memory_peak_bytes": ("Peak resident set of the process.", memory.peak_bytes),
        "memory_planned_bytes": ("The plan by component.", plan_bytes(service)),
        "context_tokens": ("Tokens of the context.", plan.context),
    }


def status_values(service: Service) -> dict[str, Any]:
    """Return what the page shows beside a chat: memory by component, the queue, and what was computed."""
    memory, runtime = read_process_memory(), service.runtime
    plan = runtime.plan
    return {
        "model": model_values(service),
        "memory": {
            "budget_bytes": plan.budget.num_bytes,
            "planned_bytes": plan.total_bytes,
            "resident_bytes": memory.resident_bytes,
            "peak_bytes": memory.peak_bytes,
            "plan": [
                {"component": line.component, "bytes": line.num_bytes, "why": line.why}
                for line in plan.rows
            ],
        },
        "queue": runtime.queue.to_dict(),
        "totals": service.metrics.totals(),
        "needs_key": bool(service.settings.api_keys),
    }
