"""The benchmark of a start runs through on a tiny shape; its figures mean nothing there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import start as benchmark
from tests.benchmarks.merge import Shape


def test_every_part_reports_its_seconds(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "CACHE_BYTES", 1 << 16)
    monkeypatch.setattr(benchmark, "SHARD_BYTES", 100_000)
    shape = Shape(layers=3, hidden=64, heads=4, inner=48, vocab=512)
    found = benchmark.measure(tmp_path, shape, golden / "small" / "mini.tiktoken", 1)
    assert set(found) == {"gigabytes", "load", "inspect", "begin", "cache", "whole", "ratio"}
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    assert (tmp_path / "identity.json").exists() and found["ratio"] > 1
