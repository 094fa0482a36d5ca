"""The training benchmarks run to the end on tiny shapes, where their figures mean nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qwen_ds.model.configuration import QWenConfig
from tests.benchmarks import gpu, train

ROOT = Path(__file__).parents[2]


@pytest.mark.job
def test_we_and_a_peer_train_the_same_rows(tmp_path: Path) -> None:
    steps = {"ours": 3, "c": 3}
    shape = train.Shape(hidden=64, layers=2, heads=2, inner=96, rows=64, steps=steps)
    found = train.measure(tmp_path, shape, 1, "c", ["--model.compile", "false"])
    (ours,), (peer,) = found["ours"], found["c"]
    assert len(ours["losses"]) == len(peer["losses"]) == 3
    # The same model and rows of one kind: the first losses agree, before any update.
    assert ours["losses"][0] == pytest.approx(peer["losses"][0], rel=0.01)
    for one in (ours, peer):
        assert one["tokens_per_second"] > one["rows_per_second"] > 0 and one["peak_gb"] > 0
    text = train.table(found)
    assert "Qwen-DS" in text and "(c)" in text and "1.00 x" in text


_GPU = """
import json, sys, torch
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.machine import choose_device
from qwen_ds.train.engine.start import start_process_group, stop_process_group

from tests.benchmarks import gpu
device = choose_device("cpu")
start_process_group(device, 1)
config = QWenConfig(
    vocab_size=512, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, kv_channels=16,
    intermediate_size=64,
)
plan = gpu.Plan(config, (256, 512), 32, (1, 2), 2, 4, False, 1)
results = gpu.Results(5)
gpu.measure(plan, device, results)
results.add("broken", lambda: 1 / 0)
print(gpu.report(results.found, plan, "NVIDIA H200"))
stop_process_group()
"""


@pytest.mark.job
def test_the_gpu_benchmark_runs_through_on_a_cpu() -> None:
    run = subprocess.run([sys.executable, "-c", _GPU], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [line.split("|")[1:-1] for line in run.stdout.splitlines() if line.startswith("| ")]
    names = [row[0].strip() for row in rows]
    official = [f"{name}, {length}" for name in gpu.OFFICIAL for length in (256, 512)]
    assert names[1:] == [
        *official,
        "best, 1 x 32",
        "best, 2 x 32",
        "peer, recomputation of all",
        "peer, recomputation of none",
        "broken",
    ]
    by_name = dict(zip(names, rows, strict=True))
    official_gb, mfu = (by_name["LoRA, 512"][i].strip() for i in (2, 6))
    assert official_gb == "20.4" and mfu.endswith("%")
    assert "times as fast as the faster peer" in run.stdout


def test_what_does_not_fit_is_a_figure(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    def too_large() -> dict[str, float]:
        raise torch.OutOfMemoryError

    results = gpu.Results(minutes=5)
    results.add("LoRA, 8192", too_large)
    late = gpu.Results(minutes=-1)
    late.add("LoRA, 8192", too_large)
    plan = gpu.Plan(QWenConfig())
    assert gpu.OUT_OF_MEMORY in gpu.report(results.found, plan, "CPU")
    assert gpu.OUT_OF_TIME in gpu.report(late.found, plan, "CPU")
