"""The tree of all errors, and the errors of running.

LowtideError                  every error that a user can act on; `exit_code` 1
  + BadOption                 2  an option has an impossible value (also a ValueError)
  + BadSize                   2  a size cannot be read
  + OverBudget                2  a request does not fit the memory budget
  + NotEnforceable            2  the kernel cannot enforce the budget
  + KilledByLimit             1  the kernel killed the process at its limit
  + ModelError                2  a model cannot be found, read or run
  |   - ModelNotFound
  |   - BadModelFile
  |   - UnsupportedModel
  |   - TemplateError
  |   - DownloadError         1
  + NoGpu                     2  layers were requested on a GPU, and there is none
  + CalibrationError          2  a calibration file is damaged or of another model
  + NotCalibrated             1  no setting of a policy reaches the target
  + PromptTooLong             2  the prompt does not fit the context
  + TextTooLong               2  a text to embed does not fit the context
  + ForwardError              1  a forward pass failed in native code
  + CannotRepack              1  the weights of a model cannot be repacked here
  + ConstraintFailed          1  a grammar has no way to go on
  + RuntimeUnusable           1  the runtime is closed, or another answer was started
  + AnswerCancelled           1  a submitted answer was cancelled
  + QueueFull                 1  too many submitted answers wait
  + SnapshotError             1  native code could not write or read a KV snapshot
  + TranscriptError           1  a chat could not be saved or loaded
  |   - SnapshotMismatch      2  its KV snapshot is of another model or other settings
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lowtide.attention.calibration import CalibrationError, NotCalibrated
from lowtide.memory.units import BadSize, KilledByLimit, NotEnforceable, OverBudget
from lowtide.models.arguments.names import option
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
    "AnswerCancelled",
    "BadModelFile",
    "BadOption",
    "BadSize",
    "CalibrationError",
    "CannotRepack",
    "ConstraintFailed",
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
    "QueueFull",
    "RuntimeUnusable",
    "SnapshotError",
    "SnapshotMismatch",
    "TemplateError",
    "TextTooLong",
    "TranscriptError",
    "UnsupportedModel",
]


class CannotRepack(LowtideError):
    """The weights of a model cannot be repacked; it runs from its own file."""


class ConstraintFailed(LowtideError):
    """A schema or grammar has no way to go on, or checking it takes more work than the limits allow."""


class PromptTooLong(LowtideError):
    """The prompt has `num_tokens` tokens and the context has room for `context`.

    The number may be `estimated`, of a text that is not tokenised, or `at_least`, of one that was not read to its
    end. `longest` is the model's own context, None where it is not known.
    """

    exit_code = 2

    def __init__(
        self,
        num_tokens: int,
        context: int,
        *,
        estimated: bool = False,
        at_least: bool = False,
        droppable: bool = True,
        longest: int | None = None,
    ) -> None:
        self.num_tokens = num_tokens
        self.context = context
        self._how = {"estimated": estimated, "at_least": at_least, "droppable": droppable}
        about = "more than " * at_least + "about " * estimated
        super().__init__(
            f"the prompt has {about}{num_tokens:,} tokens but the context holds {context:,}; "
            f"{_advice(context, longest, droppable)}"
        )

    def of_model(self, longest: int) -> PromptTooLong:
        """Return the error for a model whose own context has `longest` tokens, with hints that help there."""
        return PromptTooLong(self.num_tokens, self.context, longest=longest, **self._how)


@contextlib.contextmanager
def hints_for(longest: int) -> Iterator[None]:
    """Raise `PromptTooLong` with the hints that help for a model whose own context has `longest` tokens."""
    try:
        yield
    except PromptTooLong as error:
        raise error.of_model(longest) from None


def _advice(context: int, longest: int | None, droppable: bool) -> str:
    """Return what to change; a context that is the model's own cannot be raised."""
    hints = ["shorten the prompt"]
    is_models_own = longest is not None and context >= longest
    if not is_models_own:
        hints.append(f"raise {option('context')} (and {option('memory')})")
    if droppable:
        hints.append(f"pass {option('overflow', 'drop-oldest')}")
    if is_models_own:
        hints.append("use a model with a longer context")
    return ", ".join(hints[:-1]) + (", or " if len(hints) > 1 else "") + hints[-1]


class TextTooLong(LowtideError):
    """A text to embed, number `number`, does not fit the context; `size` says how long it is."""

    exit_code = 2

    def __init__(self, number: int, size: str, context: int) -> None:
        self.number = number
        self.context = context
        super().__init__(
            f"text {number} has {size}, and texts of up to {context:,} tokens can be embedded; shorten it, raise "
            f"{option('context')}, or pass {option('overflow', 'truncate')}"
        )


class RuntimeUnusable(LowtideError):
    """The runtime is closed, or another answer was started on it."""


class AnswerCancelled(LowtideError):
    """A submitted answer was cancelled before it was complete."""


class QueueFull(LowtideError):
    """As many submitted answers wait as may; `retry_after_s` is when one of them may have ended, None if unknown."""

    def __init__(self, num_waiting: int, retry_after_s: float | None) -> None:
        self.num_waiting = num_waiting
        self.retry_after_s = retry_after_s
        when = "later" if retry_after_s is None else f"in about {max(round(retry_after_s), 1)} s"
        super().__init__(
            f"{num_waiting} answers wait already, as many as {option('max_waiting')} allows: submit again {when}, or "
            f"raise {option('max_waiting')}"
        )


class TranscriptError(LowtideError):
    """A chat could not be saved or loaded; the one in memory is unchanged."""


class SnapshotMismatch(TranscriptError):
    """The KV snapshot in a file is of another model, KV type or attention, or longer than the context.

    The messages in the file can be read all the same; answering them computes them again.
    """

    exit_code = 2
