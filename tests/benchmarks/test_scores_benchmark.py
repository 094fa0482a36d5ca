"""The benchmark of the scores runs through on a few texts; its seconds mean nothing there."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks import scores as benchmark


def test_it_scores_long_and_short_pairs_and_counts_intervals(tmp_path: Path) -> None:
    texts = [f"这件衣服的颜色是第{number}种。" for number in range(14)]
    rows = benchmark.pairs(texts)
    assert len(rows) == 14
    assert sum(len(row.prediction) > 500 for row in rows) == benchmark.LONG_PAIRS
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"summary": text}) for text in texts), encoding="utf-8")
    found = benchmark.main(["--data", str(file), "--sets", "40"])
    assert found["rows"] == 14 and found["scores_cpu_seconds"] > 0
    shares = [found[f"coverage_{kind}_200"] for kind in ("skewed", "rate")]
    assert all(0.75 <= share <= 1.0 for share in shares)
