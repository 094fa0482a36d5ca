"""A request whose logits are not finite ends alone, however many answers share its steps."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qwen_ds.decode.request import Request
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.model.folder import find_model
from serve.engine.engine import stream
from serve.engine.loading import load_engine
from tests.serve.api.running import Running, running

COMPLETIONS = "/v1/completions"
POISON = 151_700  # an extra token: no text becomes it
TEXTS = [f"第{i}个问题 {'abc de ' * (i % 5)}" for i in range(31)]
ANSWER_TOKENS = 8


@pytest.fixture(scope="module")
def poisoned_dir(full_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model, of which one token's embedding is no number."""
    folder = tmp_path_factory.mktemp("poisoned")
    shutil.copytree(full_dir, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.weight"][POISON] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def known_answers(folder: Path) -> list[str]:
    """What the engine of a folder answers to TEXTS in this process."""
    engine, encoding = load_engine(folder, device="cpu"), find_model(folder).encoding
    sampling = SamplingParams(max_new_tokens=ANSWER_TOKENS)
    requests = [Request(encoding.ordinary(text), sampling, engine.stop) for text in TEXTS]
    answers = dict(stream(engine.start(memory_gb=0.05), requests))
    return [answers[i].text for i in range(len(TEXTS))]


@pytest.mark.job
def test_a_poisoned_request_among_many_fails_alone(full_dir: Path, poisoned_dir: Path) -> None:
    expected = known_answers(full_dir)

    def ask(server: Running, prompt: str | list[int]) -> Any:
        body = {"prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0}
        return server.client.post(COMPLETIONS, json=body)

    words = ["--model", str(poisoned_dir), "--slots", "32", "--memory_gb", "0.001"]
    with running(*words) as server, ThreadPoolExecutor(32) as pool:
        engines = server.engines()
        # Each round leaves pages behind that held what is no number; the next one gets them.
        for place in (5, 20):
            poison = [*range(1000, 1050), POISON, *range(2000, 2000 + place)]
            prompts: list[str | list[int]] = [*TEXTS[:place], poison, *TEXTS[place:]]
            answers = list(pool.map(lambda prompt: ask(server, prompt), prompts))
            failed = answers.pop(place)
            assert [answer.status_code for answer in answers] == [200] * len(TEXTS)
            assert [answer.json()["choices"][0]["text"] for answer in answers] == expected
            error = failed.json()["error"]
            assert failed.status_code == 500 and error["type"] == "server_error"
            assert "not finite" in error["message"] and "\n" not in error["message"]
        assert server.engines() == engines, "no engine was started anew"
        assert server.figure("vllm:kv_cache_usage_perc") == 0
