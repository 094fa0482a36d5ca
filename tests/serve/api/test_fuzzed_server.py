"""Whatever the document of the API allows, sent to a server with a model: answers, or errors in
OpenAI's form, by the same engine to the end."""

from __future__ import annotations

import json
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from tests.serve.api.running import Running, until

pytestmark = pytest.mark.job
# By route, what lets a body through to the engine whose other fields are anything.
FUZZED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "q"}], "model": "qwen"},
    "/v1/completions": {"prompt": ["a", "b"], "model": "qwen"},
    "/tokenize": {"prompt": "a", "model": "qwen"},
    "/detokenize": {"tokens": [1, 2], "model": "qwen"},
}
EXAMPLES, MOST_TOKENS = 12, 4


def sent(server: Running, path: str, body: Any) -> int:
    """The status of a request, whose answer must be whole."""
    if isinstance(body, dict) and path.startswith("/v1"):  # seconds are for other tests
        body = {"max_tokens": MOST_TOKENS} | body
        for name, most in (("max_tokens", MOST_TOKENS), ("max_completion_tokens", MOST_TOKENS)):
            if type(body.get(name)) is int:
                body[name] = min(body[name], most)
        if type(body.get("n")) is int:
            body["n"] = min(body["n"], 3)
    raw = json.dumps(body, ensure_ascii=True).encode()
    response = server.client.post(path, content=raw, headers={"Content-Type": "application/json"})
    if response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n")
        assert '"server_error"' not in response.text, (body, response.text)
    elif response.status_code != 200:
        error = response.json()["error"]
        assert response.status_code < 500, (body, error)
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
    else:
        assert isinstance(response.json(), dict)
    return response.status_code


@pytest.mark.parametrize("path", FUZZED)
def test_what_the_document_allows_is_answered_by_a_living_engine(
    server: Running, path: str
) -> None:
    engines, right = server.engines(), FUZZED[path]
    operation = schemathesis.openapi.from_url(f"{server.url}/openapi.json")[path]["POST"]
    statuses = {"any": set[int](), "right": set[int](), "wrong": set[int]()}
    quick = settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    @quick
    @given(operation.as_strategy())
    def allowed(case: Any) -> None:
        statuses["any"].add(sent(server, path, case.body))
        statuses["right"].add(sent(server, path, case.body | right))

    @quick
    @given(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def not_allowed(case: Any) -> None:
        body = case.body if isinstance(case.body, dict | list | str | int | None) else None
        statuses["wrong"].add(sent(server, path, body))

    allowed()
    not_allowed()
    assert 200 in statuses["right"] and 400 in statuses["wrong"]
    assert server.engines() == engines
    until(lambda: server.figure("vllm:num_requests_running") == 0)
    assert sent(server, path, right) == 200
