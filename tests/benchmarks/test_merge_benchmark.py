"""The benchmark of the merge runs through on a tiny shape; its figures mean nothing there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.benchmarks import merge as benchmark


def test_the_shape_is_that_of_qwen_7b() -> None:
    items = sum(math.prod(size) for size in benchmark.Shape().tensors().values())
    assert items == 7_721_324_544  # parameters of Qwen-7B


@pytest.mark.job
def test_every_part_reports_its_figures(golden: Path, tmp_path: Path) -> None:
    shape = benchmark.Shape(layers=9, hidden=64, heads=4, inner=48, vocab=512, rank=4)
    found = dict(
        benchmark.measure(tmp_path, shape, golden / "small" / "mini.tiktoken", with_peft=True)
    )
    assert found["checkpoint"]["files"] == benchmark.NUM_SHARDS
    assert found["checkpoint"]["bytes"] > 2 * sum(
        math.prod(size) for size in shape.tensors().values()
    )
    assert found["sampled proof"]["status"] == "passed"
    assert found["merge"]["changed"] == 9 * 5
    for part in ("cp and one read", "merge", "sampled proof", "peft"):
        assert found[part]["seconds"] > 0 and found[part]["cpu_seconds"] >= 0
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "peft"}
