"""Errors of the API, in OpenAI's form."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from serve.api.jobs import ENGINE_GONE, JobError

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
# Errors of the engine that are the request's own fault.
_OF_THE_REQUEST = {
    "InvalidSampling", "InvalidGrammar", "PromptTooLong", "EmptyPrompt", "InvalidToken",
    "UnknownAdapter", "KVBudgetTooSmall", "NoTokenLeft",
}  # fmt: skip
_VALUE_CHARACTERS, _LOGGED_CHARACTERS, _SENT_CHARACTERS = 80, 200, 2000
_HELD_CHARACTERS = 10_000
# A client's value, as repr writes it; one that was cut may lack its end.
_QUOTED = re.compile(r"(?<!\w)(['\"])((?:\\.|(?!\1).)*)(\1|$)", re.DOTALL)


@dataclass
class ApiError(Exception):
    """An answer that is an error: its status, one line, and the field that is to blame."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None  # seconds
    quotes_client: bool = False  # the message has a client's text outside of quotes, too

    def __post_init__(self) -> None:
        if len(self.message) > _HELD_CHARACTERS:  # its ends are ours, a client's value between them
            half = _HELD_CHARACTERS // 2
            self.message = f"{self.message[:half]}…{self.message[-half:]}"

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status)
        if kind is None:
            kind = "invalid_request_error" if self.status < 500 else "server_error"
        message = _QUOTED.sub(lambda m: m[1] + _cut(m[2], _VALUE_CHARACTERS) + m[3], self.message)
        message = _cut(message, _SENT_CHARACTERS)
        error = {"message": message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 504:  # clients of OpenAI try 5xx again, and it would take as long
            headers["x-should-retry"] = "false"
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    def encoded(self) -> tuple[dict[str, str], bytes]:
        """All headers and the body of the answer."""
        body = json.dumps(self.body(), ensure_ascii=False).encode(errors="backslashreplace")
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        return headers | self.headers(), body

    def logged(self) -> str:
        """The error for the log: what is to blame and why, without the client's own text."""
        blamed = " ".join(f"{part}:" for part in (self.code, self.param) if part is not None)
        text = "refused" if self.quotes_client else _QUOTED.sub(r"\1…\1", self.message)
        return _cut(f"{blamed} {text}".lstrip(), _LOGGED_CHARACTERS)


def of_job(error: JobError) -> ApiError:
    """The error of a job, which the request, the model or the engine is to blame for."""
    if error.kind in _OF_THE_REQUEST:
        code = "context_length_exceeded" if error.kind == "PromptTooLong" else None
        return ApiError(
            400, error.message, error.param, code, quotes_client=error.kind == "InvalidGrammar"
        )
    return ApiError(500, error.message, code="engine_gone" if error.kind == ENGINE_GONE else None)


def shortened(value: object) -> str:
    """A client's value for a message, a text within its quotes."""
    if isinstance(value, str):
        return repr(_cut(value, _VALUE_CHARACTERS))
    return _cut(repr(value), _VALUE_CHARACTERS)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "…"
