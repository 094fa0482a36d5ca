"""What a run tells about its speed: utilisation, tokens of each rank, and where the time of profiled steps goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwen_ds.data.batches import WindowStatistics
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.plan.gpus import gpu_named
from qwen_ds.plan.shape import Shape
from qwen_ds.train.observe.profiler import PARTS, _under_way
from qwen_ds.train.observe.progress import Hardware, Step, metrics


def _step(number: int) -> Step:
    window = WindowStatistics(
        rows=8, tokens=8 * 2048, squared_tokens=8 * 2048**2, padded_tokens=10 * 2048, micro_batches=8,
        imbalance=1.0,
    )  # fmt: skip
    return Step(number, 0, 100.0, 8 * 2048, 1e-3, 1.0, 0, window)


def test_utilisation_is_told_where_the_peak_is_known() -> None:
    """The official recipe's 5.2 s a step are 31 % of an A100; on two GPUs the same is half of that."""
    shape = Shape.of(QWenConfig())
    steps = [(_step(1), 5.2), (_step(2), 5.2)]
    row = metrics(steps, Hardware(1, shape, "lora", gpu_named("a100")))
    assert row["mfu"] == pytest.approx(0.31, abs=0.015)
    assert (
        row["tokens_per_second"]
        == row["tokens_per_second_per_rank"]
        == pytest.approx(8 * 2048 / 5.2)
    )
    both = metrics(steps, Hardware(2, shape, "lora", gpu_named("a100")))
    assert both["mfu"] == pytest.approx(row["mfu"] / 2)
    assert both["tokens_per_second_per_rank"] == pytest.approx(row["tokens_per_second"] / 2)
    assert metrics(steps, Hardware(1, shape, "full", gpu_named("a100")))["mfu"] > 1.4 * row["mfu"]
    assert "mfu" not in metrics(steps, Hardware(1, shape, "lora", None))


def test_a_cpu_has_no_known_peak(small_dir: Path) -> None:
    assert Hardware.of(torch.device("cpu"), small_dir, "lora").gpu is None


def test_collectives_that_overlap_count_once() -> None:
    class Event:
        def __init__(self, name: str, start: float, end: float) -> None:
            self.name, self.time_range = name, self
            self.start, self.end = start, end

    events = [
        Event("gloo:all_reduce", 0, 10), Event("nccl:all_gather", 5, 20), Event("aten::mm", 0, 100),
        Event("ncclDevKernel_AllReduce", 7, 9), Event("gloo:broadcast", 30, 31),
    ]  # fmt: skip
    assert _under_way(events) == pytest.approx(21e-6)


@pytest.mark.job
def test_profiled_steps_leave_a_trace_and_a_split(
    job: Callable, small_job: list[str], tmp_path: Path
) -> None:
    """Nor do they change any number: the same run without the profiler ends with the same adapter."""
    profiled = [*small_job, "--optim.max_steps", "4", "--log.profile_steps", "[2, 3]"]
    out = job([*profiled, "--output_dir", str(tmp_path / "a")], 2).ok().out
    split = json.loads((tmp_path / "a" / "profile" / "profile.json").read_text())
    assert (split["first_step"], split["last_step"]) == (2, 3) and set(split["parts"]) == {
        *PARTS,
        "other",
    }
    assert sum(split["parts"].values()) == pytest.approx(split["seconds"])
    assert all(split["parts"][name] > 0 for name in PARTS) and split["communication"] > 0
    assert len(list((tmp_path / "a" / "profile").glob("rank0.*.pt.trace.json"))) == 1
    assert "profiled steps 2 to 3" in out and "backward" in out
    job([*small_job, "--optim.max_steps", "4", "--output_dir", str(tmp_path / "b")], 2).ok()
    weights = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in "ab"
    ]
    assert weights[0] == weights[1]
