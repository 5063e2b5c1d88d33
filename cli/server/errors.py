"""ApiError: what a request did wrong, in the form of OpenAI's API, and the same for lowtide's own errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowtide.models.errors import BadOption, ForwardError, TemplateError
from lowtide.runtime.errors import (
    ConstraintFailed,
    LowtideError,
    OverBudget,
    PromptTooLong,
    QueueFull,
    RuntimeUnusable,
    TextTooLong,
)

INVALID = "invalid_request_error"
SERVER = "server_error"


class ApiError(Exception):
    """An answer with a status of 400 or more; `param` names the part of the request, `code` is for machines."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind, self.headers = kind, dict(headers or {})

    def to_dict(self) -> dict[str, Any]:
        """Return the object that clients read."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


_KINDS: tuple[tuple[type[LowtideError], int, str, str], ...] = (
    (PromptTooLong, 400, "context_length_exceeded", INVALID),
    (TextTooLong, 400, "context_length_exceeded", INVALID),
    (OverBudget, 413, "over_budget", INVALID),
    (BadOption, 400, "invalid_value", INVALID),
    (TemplateError, 400, "template_error", INVALID),
    (ConstraintFailed, 500, "constraint_failed", SERVER),
    (RuntimeUnusable, 503, "unavailable", SERVER),
    (ForwardError, 500, "forward_error", SERVER),
)


def api_error(error: BaseException, param: str | None = None) -> ApiError:
    """Return the error as a client gets it; what lowtide does not know is "internal error", without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return _queue_full(error)
    for kind, status, code, group in _KINDS:
        if isinstance(error, kind):
            return ApiError(status, str(error), param=param, code=code, kind=group)
    if isinstance(error, LowtideError):
        status = 400 if error.exit_code == 2 else 500
        return ApiError(status, str(error), param=param, kind=INVALID if status == 400 else SERVER)
    return ApiError(
        500,
        "lowtide made a mistake: the server's log says which",
        code="internal_error",
        kind=SERVER,
    )


def _queue_full(error: QueueFull) -> ApiError:
    seconds = 1.0 if error.retry_after_s is None else error.retry_after_s
    return ApiError(
        429,
        str(error),
        code="queue_full",
        kind="rate_limit_error",
        headers={"Retry-After": str(max(1, round(seconds)))},
    )
