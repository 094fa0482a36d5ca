"""Figures for Prometheus: the names that vLLM's board asks for, and no label that clients make."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from qwen_ds.decode.request import PromptFigures
from serve.api.jobs import Job, JobError
from serve.api.metrics import Metrics
from tests.serve.api.scripted import ScriptedPool, scripted_app

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# The series of vLLM's own Grafana board, with the older names of some of them.
BOARD = """
    vllm:e2e_request_latency_seconds_bucket vllm:e2e_request_latency_seconds_sum
    vllm:e2e_request_latency_seconds_count vllm:prompt_tokens_total vllm:generation_tokens_total
    vllm:inter_token_latency_seconds_bucket vllm:inter_token_latency_seconds_sum
    vllm:inter_token_latency_seconds_count vllm:time_per_output_token_seconds_bucket
    vllm:time_per_output_token_seconds_sum vllm:time_per_output_token_seconds_count
    vllm:num_requests_running vllm:num_requests_waiting vllm:time_to_first_token_seconds_bucket
    vllm:time_to_first_token_seconds_sum vllm:time_to_first_token_seconds_count
    vllm:kv_cache_usage_perc vllm:gpu_cache_usage_perc vllm:request_prompt_tokens_bucket
    vllm:request_generation_tokens_bucket vllm:request_success_total
    vllm:request_queue_time_seconds_sum vllm:request_prefill_time_seconds_sum
    vllm:request_decode_time_seconds_sum vllm:request_max_num_generation_tokens_sum
""".split()


def series(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Values by name and labels, as Prometheus reads them."""
    return {
        (one.name, frozenset(one.labels.items())): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if not one.name.endswith("_created")
    }


def asked(vocabulary: Path, bodies: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Statuses of requests, and the series before the last of them and after it."""

    def says(job: Job) -> list[str] | JobError:
        return JobError("LogitsNotFinite", "no") if job.sampling.seed == 13 else ["an ", "answer"]

    app, _ = scripted_app(vocabulary, says)

    async def ask() -> list[Any]:
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        url = "http://127.0.0.1:8044"
        async with httpx.AsyncClient(transport=transport, base_url=url) as client:
            found: list[Any] = []
            for path, body in bodies:
                found += [(await client.post(path, json=body)).status_code]
                found += [series((await client.get("/metrics")).text)]
            return found

    return asyncio.run(ask())


def chat(**more: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": [{"role": "user", "content": "q"}]} | more


def test_the_board_finds_every_series_by_its_model(vocab_path: Path) -> None:
    status, found = asked(vocab_path, [chat()])
    assert status == 200
    for name in BOARD:
        labels = [dict(labels) for one, labels in found if one == name]
        assert labels, name
        assert any(one["model_name"] == "qwen" for one in labels), name
    reasons = {dict(labels).get("finished_reason") for name, labels in found}
    assert {"stop", "length", "abort"} <= reasons


def test_figures_count_what_was_asked_and_answered(vocab_path: Path) -> None:
    *_, found = asked(vocab_path, [chat(), chat(model="tuned", n=3), chat(seed=13)])

    def value(name: str, **labels: str) -> float:
        given = set(labels.items())
        return sum(value for (one, own), value in found.items() if one == name and given <= own)

    success = "vllm:request_success_total"
    assert value(success, model_name="qwen", finished_reason="stop") == 1
    assert value(success, model_name="tuned", finished_reason="stop") == 3
    assert value(success, finished_reason="error") == 1
    assert value("vllm:generation_tokens_total", model_name="qwen") == 2
    assert value("vllm:generation_tokens_total", model_name="tuned") == 6
    assert value("vllm:time_to_first_token_seconds_count") == 4
    assert value("vllm:inter_token_latency_seconds_count") == 4
    assert value("vllm:request_generation_tokens_sum") == 8
    assert value("vllm:num_requests_running") == value("vllm:num_requests_waiting") == 0


def test_labels_do_not_grow_with_what_clients_send(vocab_path: Path) -> None:
    known = [chat(), chat(model="tuned"), chat(seed=13)]
    strange: list[tuple[str, dict[str, Any]]] = []
    for i in range(25):
        strange += [chat(model=f'model-{i}"}}\n'), chat(user=f"user-{i}", seed=i + 100)]
        strange += [chat(model="tuned", user=f"x{i}" * 100, stop=f"stop-{i}", top_k=i + 1)]
        strange += [(COMPLETIONS, {"prompt": f"prompt-{i}", "n": i % 3 + 1, "user": f"u{i}"})]
    found = asked(vocab_path, known + strange)
    statuses, before, after = found[0::2], found[2 * len(known) - 1], found[-1]
    assert statuses == [200, 200, 500] + [404, 200, 200, 200] * 25
    assert after.keys() == before.keys()
    text = str(sorted((name, sorted(labels)) for name, labels in after))
    assert not re.search(r"model-|user-|stop-|prompt-|x\d", text)


def test_the_first_end_of_an_answer_counts() -> None:
    pool: Any = ScriptedPool(lambda job: [])
    metrics = Metrics(pool, ("qwen",))
    timer = metrics.timer("qwen", 9, time.monotonic() - 5)
    timer.token(PromptFigures(3), 5)
    timer.end("length")
    timer.end("abort")
    found = series(metrics.text().decode())
    ends = {
        dict(labels)["finished_reason"]: value
        for (name, labels), value in found.items()
        if name == "vllm:request_success_total"
    }
    assert ends["length"] == 1 and sum(ends.values()) == 1
    # From the request's arrival, before its text was tokenized.
    assert timer.first_seconds is not None and timer.first_seconds >= 5
    model = frozenset({("model_name", "qwen")})
    assert found["vllm:prompt_tokens_total", model] == 5
    assert found["vllm:request_params_max_tokens_sum", model] == 9
