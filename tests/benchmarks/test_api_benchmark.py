"""The benchmark of the HTTP API runs through on a tiny shape; its speeds mean nothing there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.benchmarks import api as benchmark

TINY = benchmark.Shape(
    hidden=16, layers=1, heads=2, intermediate=32, requests=6, longest_prompt=12, longest_answer=6
)
CONTENDERS = ("python", "one engine", "two engines")


@pytest.mark.job
def test_the_table_and_the_file_have_every_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        benchmark.main(["--rounds", "2", "--json", str(tmp_path / "api.json")], TINY)
    finally:
        torch.set_num_threads(threads)
    cores = len(os.sched_getaffinity(0))
    first, *lines = capsys.readouterr().out.splitlines()[-6:]  # libraries may say more
    assert first == f"{cores} cores, 1 thread for each engine"
    assert [line.partition(":")[0] for line in lines] == [*CONTENDERS, "overhead", "engines"]
    assert all("tokens/s" in line for line in lines[:3])
    assert all(line.endswith((", met)", ", missed)")) for line in lines[3:])
    found = json.loads((tmp_path / "api.json").read_text())
    assert (found["cores"], found["threads"]) == (cores, benchmark.THREADS)
    assert found["shape"]["requests"] == 6 and len(found["rounds"]) == 2
    for figures in found["rounds"]:
        assert tuple(figures) == CONTENDERS and min(figures.values()) > 0


def test_ratios_are_taken_round_by_round_and_judged_by_their_bars() -> None:
    rounds = ((100.0, 96.0, 150.0), (10.0, 9.0, 18.0), (50.0, 49.0, 49.0))
    lines = benchmark.table([dict(zip(CONTENDERS, one, strict=True)) for one in rounds])
    assert "one engine: 49.0 tokens/s" in lines
    assert "overhead: 0.96 x (bar: 0.95 x, met)" in lines
    assert "engines: 1.56 x (bar: 1.7 x, missed)" in lines
