"""Beams of the original's route: bounded, beside all other work, and given up with their client."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.serve.api.running import Running, until

pytestmark = pytest.mark.job
ROUTE = "/nlg/text_generate"


def ask(server: Running, **body: Any) -> httpx.Response:
    return server.client.post(ROUTE, json={"text": "你好", "do_sample": False} | body)


def test_more_than_there_is_memory_for_is_a_400(server: Running) -> None:
    response = ask(server, num_beams=64, max_new_tokens=1000)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "num_beams"


def test_a_temperature_that_overflows_harms_nobody(server: Running) -> None:
    response = ask(server, num_beams=3, max_new_tokens=4, do_sample=True, temperature=1e-40)
    assert response.status_code == 200
    assert ask(server, num_beams=1, max_new_tokens=4).status_code == 200


def test_beams_hold_up_nobody_and_end_with_their_client(server: Running) -> None:
    with pytest.raises(httpx.ReadTimeout):
        body = {"text": "你好", "do_sample": False, "num_beams": 3, "max_new_tokens": 2000}
        httpx.post(server.url + ROUTE, json=body, timeout=1)
    assert ask(server, max_new_tokens=4).status_code == 200
    until(lambda: server.figure("vllm:num_requests_running") == 0)
