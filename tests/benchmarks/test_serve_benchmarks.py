"""The benchmarks of serving run through on tiny shapes, where their figures mean nothing; their
contenders give the same tokens."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen_ds.decode.request import Request
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.stop import StopRule
from tests.benchmarks import gpu_serve, serve
from tests.benchmarks.serve_peers import continuous_batching

TINY = serve.Sizes(
    hidden=64, layers=2, heads=4, intermediate=128, vocab=500, large_vocab=900, seq_length=256,
    dtype=torch.float32, initializer_range=0.3, requests=8, slots=4, longest_prompt=30,
    longest_answer=12, long_prompt=100, single_requests=2, prefix=64, gap_seq_length=256,
    gap_prompt=60, streams=3, steps_before=3, prefill_tokens=16,
)  # fmt: skip


@pytest.mark.parametrize("long_every", [0, 4])
def test_all_contenders_give_the_same_greedy_tokens(long_every: int) -> None:
    requests = serve.make_requests(TINY, serve.GREEDY, long_every=long_every)
    model = TINY.model()
    answers, seconds = serve.ours(model, requests, 4, time.perf_counter, 16)
    assert seconds > 0
    assert [len(answer) for answer in answers] == [r.sampling.max_new_tokens for r in requests]
    for peer in serve.PEERS.values():
        assert peer(model, requests, 4, time.perf_counter)[0] == answers


def test_every_part_reports_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    found = serve.measure(serve.PARTS, serve.Benchmark(TINY, 2, (8, 16)))
    assert list(found) == list(serve.PARTS)
    assert all(len(rounds) == 2 for rounds in found.values())
    names = {part: set(rounds[0]) for part, rounds in found.items()}
    assert names["greedy"] == names["sampling"] == {"ours", "static", "continuous"}
    assert names["single"] == {"ours", "static"} and names["prefix"] == {"new", "known"}
    assert {"longest, served", "before, 8", "longest, 16", "prompt, 16"} <= names["gap"]
    assert all(value > 0 for rounds in found.values() for one in rounds for value in one.values())
    rows = [line.split("|")[1].strip() for line in serve.table(found).splitlines()]
    assert rows[2:] == [
        "greedy", "greedy", "sampling", "sampling", "mixed", "mixed", "single", "prefix",
        "gap", "gap", "gap",
    ]  # fmt: skip
    (gap,) = [line for line in serve.table(found).splitlines() if "longest / before, 8" in line]
    assert gap.count("before") == 2  # the figures of that limit alone


def test_the_table_holds_medians_of_ratios_and_not_ratios_of_medians() -> None:
    pairs = ((1.0, 2.0), (30.0, 10.0), (8.0, 1.0))
    rounds = [{"ours": ours, "static": static} for ours, static in pairs]
    assert serve.ratios("single", rounds) == {"static": 3.0}
    assert "by 3.00 | 1.15 x" in serve.table({"single": rounds})


def test_a_profile_names_the_rows_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.profile(TINY, 2, steps=2).startswith("2 rows: ")
    # Which rows come first is a matter of time.
    assert "ncalls" in capsys.readouterr().out


def test_a_request_that_transformers_cannot_answer_is_an_error() -> None:
    rng = random.Random(0)
    known = Request([rng.randrange(500) for _ in range(4)], SamplingParams(), StopRule())
    with pytest.raises(RuntimeError):
        continuous_batching(TINY.model(), [replace(known, prompt=[501])], 2, time.perf_counter)


GPU_TINY = {
    "hidden": 32, "layers": 1, "heads": 2, "intermediate": 64, "vocab": 500, "rows": 3,
    "context": 24, "steps": 4, "prompts": 2, "prompt_tokens": 40, "prefill_tokens": 16,
    "memory_gb": 0.001,
}  # fmt: skip


@pytest.mark.job
def test_the_gpu_benchmark_runs_through_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    gpu_serve.main(["--device", "cpu", "--plan", json.dumps(GPU_TINY), "--json", str(out)])
    found = json.loads(out.read_text())["found"]
    assert list(found) == ["batch", "prefill", "single", "sampled"]
    assert [figures["tokens"] for figures in found.values()] == [3 * 4, 2 * 40, 4, 3 * 4]
    for figures in found.values():
        assert figures["tokens_per_second"] > 0 and figures["device_ms"] > 0
        assert (figures["reading"], figures["waits"]) == ("gathered", None)
        assert "aten::scaled_dot_product_attention" in str(figures["attention"])
    assert "| batch |" in capsys.readouterr().out


def test_a_measurement_that_fails_costs_no_other(tmp_path: Path, monkeypatch) -> None:
    def apart(name: str, *_: object) -> dict[str, object]:
        return {"remark": "OutOfMemoryError"} if name == "batch" else FIGURES

    monkeypatch.setattr(gpu_serve, "measure_apart", apart)
    found = gpu_serve.measure_all(gpu_serve.Plan(), "cpu", 1, tmp_path / "found.json")
    text = gpu_serve.report(found)
    assert "| batch | OutOfMemoryError |" in text and "| single | 10 | 200 |" in text


def test_what_an_earlier_call_has_measured_is_kept(tmp_path: Path, monkeypatch) -> None:
    out, begun, plan = tmp_path / "found.json", list[str](), gpu_serve.Plan()

    def apart(name: str, *_: object) -> dict[str, object]:
        begun.append(name)
        return {"remark": gpu_serve.OUT_OF_TIME} if len(begun) == 2 else FIGURES

    monkeypatch.setattr(gpu_serve, "measure_apart", apart)
    gpu_serve.measure_all(plan, "cpu", 1, out, again=False)
    begun.clear()
    found = gpu_serve.measure_all(plan, "cpu", 1, out, again=False)
    assert begun == ["prefill"] and found["prefill"] == found["batch"] == FIGURES
    begun.clear()
    gpu_serve.measure_all(replace(plan, steps=2), "cpu", 1, out, again=False)
    assert begun == ["batch", "prefill", "single", "sampled"], "another plan"


def test_what_has_no_time_left_is_not_begun() -> None:
    assert gpu_serve.measure_apart("batch", gpu_serve.Plan(), "cpu", -1.0) == {
        "remark": gpu_serve.OUT_OF_TIME
    }


@pytest.mark.job
def test_a_measurement_that_does_not_fit_says_so() -> None:
    plan = gpu_serve.Plan(**{**GPU_TINY, "memory_gb": 1e-6})
    assert "KVBudgetTooSmall" in gpu_serve.measure_apart("batch", plan, "cpu", 60)["remark"]


FIGURES: dict[str, object] = {
    "tokens_per_second": 10.0, "step_ms": 1.0, "device_ms": 1.0, "peak_gb": 1.0,
    "reading": "tables", "waits": 1, "attention": ["flash"], "device": "cpu",
}  # fmt: skip
