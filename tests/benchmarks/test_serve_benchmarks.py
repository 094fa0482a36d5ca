"""The benchmarks of serving run through on tiny shapes, where their figures mean nothing; their
contenders give the same tokens."""

from __future__ import annotations

import io
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_ds.decode.request import Request
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.stop import StopRule
from tests.benchmarks import gpu_results, gpu_serve, gpu_serving, serve
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


def of_file(file: Path) -> dict[str, dict[str, Any]]:
    """The figures in a file of results, by measurement."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line.pop("measurement"): line for line in lines if "measurement" in line}


@pytest.mark.job
def test_the_gpu_benchmark_runs_through_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.jsonl"
    plan = ["--device", "cpu", "--plan", json.dumps(GPU_TINY), "--json", str(out)]
    assert gpu_serve.main(plan) == 0
    found = of_file(out)
    assert list(found) == ["batch", "prefill", "single", "sampled"], capsys.readouterr().out
    assert [figures["tokens"] for figures in found.values()] == [3 * 4, 2 * 40, 4, 3 * 4]
    for figures in found.values():
        assert figures["tokens_per_second"] > 0 and figures["device_ms"] > 0
        assert figures["reading"] == "gathered" and "waits" not in figures
        assert "aten::scaled_dot_product_attention" in str(figures["attention"])
    assert "| batch |" in capsys.readouterr().out


# It answers with the figures that it is given, but to the measurement "batch" of a first try.
_PRETENDER = """
import json, pathlib, sys
question, tried = json.loads(sys.stdin.readline() or "{}"), pathlib.Path(sys.argv[2])
if question:
    is_first = not tried.exists()
    with tried.open("a") as out:
        out.write(question["measurement"] + "\\n")
    if is_first:
        print(json.dumps({"failed": "RuntimeError: an illegal address"}))
    else:
        print(sys.argv[1])
        print(json.dumps({"end": True}))
"""


def test_what_fails_costs_no_other_and_is_tried_again_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, tried = tmp_path / "found.jsonl", tmp_path / "tried"
    command = [sys.executable, "-c", _PRETENDER, json.dumps(FIGURES), str(tried)]
    assert gpu_serve.main(["--json", str(out)], command) == 0
    shown = capsys.readouterr().out
    assert "| batch | RuntimeError: an illegal address |" in shown
    assert "| single | 10 | 200 |" in shown
    assert gpu_serve.main(["--json", str(out)], command) == 0
    assert tried.read_text().split() == ["batch", "prefill", "single", "sampled", "batch"]
    assert "| batch | 10 | 4500 | 1.0 | 1.0 | 1 | 1.0 | tables | flash |" in capsys.readouterr().out
    before = out.read_bytes()
    assert gpu_serve.main(["--json", str(out), "--plan", '{"steps": 2}'], command) == 2
    assert out.read_bytes() == before and "name another file" in capsys.readouterr().err
    tried.write_text("")
    assert gpu_serve.main(["--json", str(out), "--again"], command) == 0
    assert tried.read_text().split() == ["batch", "prefill", "single", "sampled"]


def test_what_has_no_time_left_is_not_begun(tmp_path: Path) -> None:
    out = tmp_path / "found.jsonl"
    assert gpu_serve.main(["--json", str(out), "--minutes", "-1"], ["false"]) == 0
    assert {one["remark"] for one in of_file(out).values()} == {gpu_results.OUT_OF_TIME}


def test_a_measurement_that_does_not_fit_says_so() -> None:
    out = io.StringIO()
    plan = {**GPU_TINY, "memory_gb": 1e-6}
    question = {"measurement": "batch", "plan": plan, "device": "cpu"}
    assert not gpu_serving.answer(question, out)
    assert "KVBudgetTooSmall" in json.loads(out.getvalue())["failed"]


FIGURES: dict[str, object] = {
    "tokens_per_second": 10.0, "step_ms": 1.0, "device_ms": 1.0, "peak_gb": 1.0,
    "reading": "tables", "waits": 1, "attention": ["flash"], "device": "NVIDIA H200",
}  # fmt: skip
