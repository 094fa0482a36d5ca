"""lm-evaluation-harness with the tasks of docs/lm_eval: the Qwen2 export and the API agree; and
so do the engine and the API in serve.evaluate --general."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.endpoint.client import connect
from serve.endpoint.options import EndpointOptions
from serve.files.sources import find_source
from serve.options import EvaluateOptions
from serve.scores.general import scorer_of
from serve.scores.general_rows import GeneralRow, read_general
from serve.scores.likelihood import EndpointScorer, Scorer
from tests.jobs import ROOT
from tests.serve.api.running import Running, running

TASKS = ROOT / "docs" / "lm_eval"
# Short: the small model's context has 64 tokens, mostly of one byte.
QUESTIONS = [
    {"question": "1+1?", "A": "3", "B": "2", "C": "5", "D": "9", "answer": "B"},
    {"question": "sun?", "A": "E", "B": "W", "C": "S", "D": "N", "answer": "A"},
    {"question": "ice?", "A": "1", "B": "4", "C": "7", "D": "0", "answer": "D"},
]
TEXTS = [{"text": "山上的雪化了。"}, {"text": "Ice melts, and the streams run fast."}]

pytestmark = pytest.mark.job


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the command is started, with the rows."""
    found = tmp_path_factory.mktemp("lm_eval")
    for name, rows in (("choice", QUESTIONS), ("text", TEXTS)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (found / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def export(small_dir: Path, folder: Path) -> Path:
    """The model as a Qwen2."""
    words = ["merge.py", "--base", small_dir, "--output", folder / "export", "--format", "qwen2"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / "launch" / "merge.py"), run_name="__main__")
    assert left.value.code == 0
    return folder / "export"


@pytest.fixture(scope="module")
def served(small_dir: Path) -> Iterator[Running]:
    with running("--model", str(small_dir), "--dtype", "float32") as server:
        yield server


@pytest.fixture
def offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def harness(model: str, arguments: dict[str, Any]) -> tuple[dict[str, float], list[float]]:
    """The scores, and every log-likelihood."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = simple_evaluate(
        model=model, model_args=arguments, tasks=["qwen_ds_choice", "qwen_ds_text"],
        task_manager=tasks, device="cpu", bootstrap_iters=0,
    )  # fmt: skip
    assert found is not None
    choice, text = (found["results"][f"qwen_ds_{kind}"] for kind in ("choice", "text"))
    samples = [one for name in ("choice", "text") for one in found["samples"][f"qwen_ds_{name}"]]
    told = [float(value) for one in samples for value in _values(one["filtered_resps"])]
    return {"acc": choice["acc,none"], "bits": text["bits_per_byte,none"]}, told


def _values(found: Any) -> Iterator[float]:
    """The log-likelihoods among the answers: (log p, is it greedy), or log p alone."""
    for one in found:
        yield one[0] if isinstance(one, list | tuple) else one


def test_the_export_and_the_api_have_the_same_scores(
    offline: None, export: Path, served: Running
) -> None:
    pytest.importorskip("lm_eval")
    url = f"{served.url}/v1/completions"
    one, likelihoods = harness("hf", {"pretrained": str(export), "dtype": "float32"})
    other, others = harness(
        "local-completions",
        {"model": served_name(served), "base_url": url, "tokenizer": str(export)},
    )
    assert other == pytest.approx(one, abs=1e-3)
    assert len(likelihoods) == 4 * len(QUESTIONS) + len(TEXTS)
    assert others == pytest.approx(likelihoods, abs=1e-3)


def served_name(server: Running) -> str:
    return str(server.client.get("/v1/models").json()["data"][0]["id"])


def test_general_rows_have_one_likelihood_by_the_engine_and_by_the_api(
    small_dir: Path, folder: Path, served: Running
) -> None:
    rows = read_general([str(folder / "choice.jsonl"), str(folder / "text.jsonl")])
    options = EvaluateOptions(model=str(small_dir), output_dir="x", dtype="float32", device="cpu")
    here = figures(scorer_of(find_source(options.model, options)), rows)
    endpoint = connect(EndpointOptions(f"{served.url}/v1"), 10.0, lambda _: None, 4)
    there = figures(EndpointScorer(endpoint), rows)
    assert len(here) == 4 * len(QUESTIONS) + 2 * len(TEXTS)
    assert there == pytest.approx(here, abs=1e-3)


def figures(scorer: Scorer, rows: list[GeneralRow]) -> list[float]:
    """All figures of the rows in order."""
    found: dict[int, Any] = dict(scorer.score([row.item for row in rows]))
    out: list[float] = []
    for i in range(len(rows)):
        one = found[i]
        out += one.logprobs if hasattr(one, "logprobs") else (one.nll, one.tokens)
    return out
