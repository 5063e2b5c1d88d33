"""The whole error tree, and the errors of running.

LowtideError                 everything a user can act on; `exit_code` 1
  + BadOption                2  an option with an impossible value (also a ValueError)
  + BadSize                  2  a size that cannot be read
  + OverBudget               2  what was asked for does not fit the budget
  + NotEnforceable           2  the kernel cannot be made to hold the budget
  + KilledByLimit            1  the kernel ended the process at its limit
  + ModelError               2  a model cannot be found, read or run
  |   - ModelNotFound
  |   - BadModelFile
  |   - UnsupportedModel
  |   - TemplateError
  |   - DownloadError        1
  + NoGpu                    2  layers were wanted on a GPU, and there is none
  + CalibrationError         2  a calibration file is broken or of another model
  + NotCalibrated            1  no setting of a policy stays inside the target
  + PromptTooLong            2  the prompt does not fit the context
  + ForwardError             1  a forward pass failed in native code
  + CannotRepack                1  a model has no packed copy, and cannot have one here
  + RuntimeUnusable          1  closed, or busy with another answer
  + SnapshotError               1  native code could not write or read a KV cache
  + TranscriptError          1  a conversation could not be saved or loaded
  |   - SessionMismatch      2  its KV state belongs to another model or setting
"""

from __future__ import annotations

from lowtide.attention.calibration import CalibrationError, NotCalibrated
from lowtide.memory.units import BadSize, KilledByLimit, NotEnforceable, OverBudget
from lowtide.models.errors import (
    BadModelFile,
    BadOption,
    DownloadError,
    ForwardError,
    LowtideError,
    ModelError,
    ModelNotFound,
    NoGpu,
    SnapshotError,
    TemplateError,
    UnsupportedModel,
)

__all__ = [
    "BadModelFile",
    "BadOption",
    "BadSize",
    "CalibrationError",
    "CannotRepack",
    "DownloadError",
    "ForwardError",
    "KilledByLimit",
    "LowtideError",
    "ModelError",
    "ModelNotFound",
    "NoGpu",
    "NotCalibrated",
    "NotEnforceable",
    "OverBudget",
    "PromptTooLong",
    "RuntimeUnusable",
    "SessionMismatch",
    "SnapshotError",
    "TemplateError",
    "TranscriptError",
    "UnsupportedModel",
]


class CannotRepack(LowtideError):
    """There is no packed copy of a model, for the reason given; it runs from its own file."""


class PromptTooLong(LowtideError):
    """The prompt has `num_tokens` tokens and the context `context`."""

    exit_code = 2

    def __init__(
        self, num_tokens: int, context: int, *, estimated: bool = False, droppable: bool = True
    ) -> None:
        self.num_tokens = num_tokens
        self.context = context
        about = "about " if estimated else ""
        advice = "shorten the prompt, or raise --context (and --memory)"
        if droppable:
            advice = "shorten the prompt, raise --context, or pass --overflow drop-oldest"
        super().__init__(
            f"the prompt has {about}{num_tokens:,} tokens, the context holds {context:,}: {advice}"
        )


class RuntimeUnusable(LowtideError):
    """The runtime is closed, or another answer has been started on it."""


class TranscriptError(LowtideError):
    """A conversation could not be saved or loaded; the one in memory is as it was."""


class SessionMismatch(TranscriptError):
    """The file's KV state belongs to another model, KV type or attention, or to a longer context.

    Its messages can be read all the same, and answered after reading them again.
    """

    exit_code = 2
