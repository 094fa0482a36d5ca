"""Errors of the API, in OpenAI's form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serve.api.jobs import ENGINE_GONE, JobError

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
# Errors of the engine that are the request's own fault.
_OF_THE_REQUEST = {
    "InvalidSampling", "InvalidGrammar", "PromptTooLong", "EmptyPrompt", "InvalidToken",
    "UnknownAdapter", "KVBudgetTooSmall", "NoTokenLeft",
}  # fmt: skip


@dataclass
class ApiError(Exception):
    """An answer that is an error: its status, one line, and the field that is to blame."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None  # seconds

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status)
        if kind is None:
            kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def of_job(error: JobError) -> ApiError:
    """The error of a job, which the request, the model or the engine is to blame for."""
    if error.kind in _OF_THE_REQUEST:
        code = "context_length_exceeded" if error.kind == "PromptTooLong" else None
        return ApiError(400, error.message, error.param, code)
    return ApiError(500, error.message, code="engine_gone" if error.kind == ENGINE_GONE else None)
