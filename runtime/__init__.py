"""Runs a model inside its plan. The front door."""

from lowtide.attention.delta.block_policy import DeltaBlocks
from lowtide.attention.delta.policy import Delta
from lowtide.attention.dense import Dense
from lowtide.attention.gem import Gem
from lowtide.attention.tidal import Tidal
from lowtide.memory.plan import MemoryPlan
from lowtide.models.fake_model import FakeModel
from lowtide.runtime.errors import LowtideError, OverBudget, PromptTooLong
from lowtide.runtime.generate import Piece
from lowtide.runtime.options import GenerationOptions
from lowtide.runtime.profiler import Profiler
from lowtide.runtime.result import GenerationResult
from lowtide.runtime.runtime import Runtime
from lowtide.runtime.statistics import Statistics

__all__ = [
    "Delta",
    "DeltaBlocks",
    "Dense",
    "FakeModel",
    "Gem",
    "GenerationOptions",
    "GenerationResult",
    "LowtideError",
    "MemoryPlan",
    "OverBudget",
    "Piece",
    "Profiler",
    "PromptTooLong",
    "Runtime",
    "Statistics",
    "Tidal",
]
