"""The benchmark of the doctor runs through on a few rows; its figures mean nothing there."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks import doctor as benchmark


def test_rows_have_their_length_and_some_are_damaged(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    benchmark.write_rows(file, 600)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    sizes = [len(row["instruction"]) + len(row["output"]) for row in rows]
    assert len(rows) == 600 and sum(size == benchmark.CHARS for size in sizes) >= 580
    texts = [json.dumps(row) for row in rows]
    assert len(set(texts)) < 600, "exact duplicates"


def test_a_run_reports_its_seconds_and_its_memory(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    benchmark.write_rows(file, 300)
    found = benchmark.measure(file, tmp_path / "out", 300)
    assert found["rows"] == 300 and found["seconds"] > 0 and found["cpu_seconds"] > 0
    assert found["rss_mb"] >= found["pss_mb"] > 10
    assert (tmp_path / "out" / "clean.jsonl").exists()
