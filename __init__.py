"""lowtide: quantised language models inside a memory budget stated in bytes.

Installed as the package's `__init__`. Each public name is imported when it is first used, so that
`import lowtide` loads nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowtide.attention.delta.policy import Delta as Delta
    from lowtide.attention.dense import Dense as Dense
    from lowtide.attention.gem.policy import Gem as Gem
    from lowtide.attention.policy import AttentionPolicy as AttentionPolicy
    from lowtide.attention.tidal.policy import Tidal as Tidal
    from lowtide.memory.plan.plan import MemoryPlan as MemoryPlan
    from lowtide.models.fake_model import FakeModel as FakeModel
    from lowtide.runtime.batch.queue import QueueFigures as QueueFigures
    from lowtide.runtime.batch.submission import Submission as Submission
    from lowtide.runtime.embedding.embedder import Embedder as Embedder
    from lowtide.runtime.errors import LowtideError as LowtideError
    from lowtide.runtime.errors import OverBudget as OverBudget
    from lowtide.runtime.errors import PromptTooLong as PromptTooLong
    from lowtide.runtime.generation.result import GenerationChunk as GenerationChunk
    from lowtide.runtime.generation.result import GenerationResult as GenerationResult
    from lowtide.runtime.generation.statistics import Statistics as Statistics
    from lowtide.runtime.options import SamplingParams as SamplingParams
    from lowtide.runtime.profiling.profiler import Profiler as Profiler
    from lowtide.runtime.runtime import Runtime as Runtime
    from lowtide.runtime.serving.tool_loop import ToolRun as ToolRun
    from lowtide.runtime.serving.tool_loop import run_tools as run_tools
    from lowtide.runtime.structured.constraint import Constraint as Constraint
    from lowtide.runtime.structured.formats import Choice as Choice
    from lowtide.runtime.structured.formats import Grammar as Grammar
    from lowtide.runtime.structured.formats import JsonObject as JsonObject
    from lowtide.runtime.structured.formats import JsonSchema as JsonSchema
    from lowtide.runtime.structured.formats import OutputFormat as OutputFormat
    from lowtide.runtime.structured.formats import Regex as Regex
    from lowtide.runtime.structured.reasoning.reason_first import ReasonFirst as ReasonFirst
    from lowtide.runtime.structured.rules.formats import AllOf as AllOf
    from lowtide.runtime.structured.rules.formats import Avoid as Avoid
    from lowtide.runtime.structured.rules.formats import Length as Length
    from lowtide.runtime.structured.rules.formats import Must as Must
    from lowtide.runtime.structured.rules.network_formats import Ltl as Ltl
    from lowtide.runtime.structured.rules.network_formats import Paths as Paths

    __version__: str

_MODULES = {
    "AttentionPolicy": "attention.policy",
    "Choice": "runtime.structured.formats",
    "Constraint": "runtime.structured.constraint",
    "Grammar": "runtime.structured.formats",
    "JsonObject": "runtime.structured.formats",
    "JsonSchema": "runtime.structured.formats",
    "OutputFormat": "runtime.structured.formats",
    "Regex": "runtime.structured.formats",
    "AllOf": "runtime.structured.rules.formats",
    "Avoid": "runtime.structured.rules.formats",
    "Length": "runtime.structured.rules.formats",
    "Must": "runtime.structured.rules.formats",
    "ReasonFirst": "runtime.structured.reasoning.reason_first",
    "Ltl": "runtime.structured.rules.network_formats",
    "Paths": "runtime.structured.rules.network_formats",
    "Delta": "attention.delta.policy",
    "Dense": "attention.dense",
    "FakeModel": "models.fake_model",
    "Gem": "attention.gem.policy",
    "SamplingParams": "runtime.options",
    "GenerationResult": "runtime.generation.result",
    "LowtideError": "runtime.errors",
    "MemoryPlan": "memory.plan.plan",
    "OverBudget": "runtime.errors",
    "GenerationChunk": "runtime.generation.result",
    "Profiler": "runtime.profiling.profiler",
    "PromptTooLong": "runtime.errors",
    "Embedder": "runtime.embedding.embedder",
    "Runtime": "runtime.runtime",
    "Submission": "runtime.batch.submission",
    "QueueFigures": "runtime.batch.queue",
    "Statistics": "runtime.generation.statistics",
    "Tidal": "attention.tidal.policy",
    "ToolRun": "runtime.serving.tool_loop",
    "run_tools": "runtime.serving.tool_loop",
}

__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from pathlib import Path

        # By the name of the metadata's folder: importlib.metadata takes 3 MiB, which no plan has.
        found = next(Path(__file__).parent.parent.glob("lowtide-*.dist-info"), None)
        if found is not None:
            return found.name.removeprefix("lowtide-").removesuffix(".dist-info")
        from importlib.metadata import version

        return version("lowtide")
    if name in _MODULES:
        return getattr(importlib.import_module(f"lowtide.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'lowtide' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
