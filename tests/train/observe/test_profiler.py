"""The time of profiled steps, split into parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen_ds.train.observe.profiler import PARTS, _under_way


def test_collectives_that_overlap_count_once() -> None:
    times = (
        ("gloo:all_reduce", 0, 10), ("nccl:all_gather", 5, 20), ("aten::mm", 0, 100),
        ("ncclDevKernel_AllReduce", 7, 9), ("gloo:broadcast", 30, 31),
    )  # fmt: skip
    events = [
        SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))
        for name, start, end in times
    ]
    assert _under_way(events) == pytest.approx(21e-6)


@pytest.mark.job
def test_profiled_steps_leave_a_trace_and_a_split(
    job: Callable, small_job: list[str], tmp_path: Path
) -> None:
    """Nor do they change any number: the same run without the profiler ends with the same
    adapter."""
    profiled = [*small_job, "--optim.max_steps", "4", "--log.profile_steps", "[2, 3]"]
    out = job([*profiled, "--output_dir", str(tmp_path / "a")], 2).ok().out
    split = json.loads((tmp_path / "a" / "profile" / "profile.json").read_text())
    assert (split["first_step"], split["last_step"]) == (2, 3)
    assert set(split["parts"]) == {*PARTS, "other"}
    # The clock of the metrics measures whole steps, the profiler's beginning and end included.
    rows = [json.loads(row) for row in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["seconds"] for row in rows[1:3]) > split["seconds"]
    assert sum(split["parts"].values()) == pytest.approx(split["seconds"])
    assert all(split["parts"][name] > 0 for name in PARTS) and split["communication"] > 0
    assert len(list((tmp_path / "a" / "profile").glob("rank0.*.pt.trace.json"))) == 1
    assert "profiled steps 2 to 3" in out and "backward" in out
    job([*small_job, "--optim.max_steps", "4", "--output_dir", str(tmp_path / "b")], 2).ok()
    weights = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in "ab"
    ]
    assert weights[0] == weights[1]
