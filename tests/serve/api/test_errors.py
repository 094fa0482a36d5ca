"""Errors in OpenAI's form: the statuses, kinds and headers by which clients decide what to do."""

from __future__ import annotations

import pytest

from qwen_ds.decode import exceptions
from serve.api.errors import ApiError, of_job
from serve.api.jobs import ENGINE_GONE, JobError


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"), (401, "authentication_error"), (404, "not_found_error"),
        (405, "invalid_request_error"), (408, "invalid_request_error"),
        (413, "invalid_request_error"), (500, "server_error"), (503, "server_error"),
        (504, "server_error"),
    ],
)  # fmt: skip
def test_the_type_follows_the_status(status: int, kind: str) -> None:
    error = ApiError(status, "why", "field", "word")
    told = {"message": "why", "type": kind, "param": "field", "code": "word"}
    assert error.body() == {"error": told}


def test_fields_that_say_nothing_are_null() -> None:
    error = ApiError(400, "why").body()["error"]
    assert error["param"] is None and error["code"] is None


def test_headers_say_when_to_come_again_and_how_to_show_a_key() -> None:
    assert ApiError(503, "busy", retry_after=7).headers()["retry-after"] == "7"
    assert ApiError(401, "no key").headers()["www-authenticate"] == "Bearer"
    plain = ApiError(400, "why").headers()
    assert "retry-after" not in plain and "www-authenticate" not in plain


@pytest.mark.parametrize(
    "kind",
    ["InvalidSampling", "InvalidGrammar", "PromptTooLong", "EmptyPrompt", "InvalidToken",
     "UnknownAdapter", "KVBudgetTooSmall"],
)  # fmt: skip
def test_an_engine_that_refuses_a_request_blames_it(kind: str) -> None:
    assert issubclass(getattr(exceptions, kind), exceptions.DecodingError)
    error = of_job(JobError(kind, "came; expected"))
    assert error.status == 400 and "came; expected" in error.message
    assert error.retry_after is None
    is_long = kind == "PromptTooLong"
    assert (error.code == "context_length_exceeded") == is_long


def test_the_log_has_nothing_of_a_schema_that_is_refused() -> None:
    """Its reasons quote the client's text as they like."""
    error = of_job(JobError("InvalidGrammar", "guided_json is refused: 秘密", "guided_json"))
    assert "秘密" in error.body()["error"]["message"]
    assert "秘密" not in error.logged() and error.logged().startswith("guided_json:")


@pytest.mark.parametrize("kind", ["LogitsNotFinite", "RowOutOfMemory", "ValueError", ENGINE_GONE])
def test_no_other_failure_is_the_requests_fault(kind: str) -> None:
    error = of_job(JobError(kind, "why"))
    assert error.status == 500 and error.body()["error"]["type"] == "server_error"
    assert (error.code == "engine_gone") == (kind == ENGINE_GONE)
