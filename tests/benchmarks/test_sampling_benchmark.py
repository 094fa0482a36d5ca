"""The benchmark of sampling runs through on a tiny vocabulary; its figures mean nothing there."""

from __future__ import annotations

from pathlib import Path

from qwen_ds.model.tokenizer import load_encoding
from tests.benchmarks import sampling as benchmark


def test_every_part_reports_its_milliseconds(golden: Path) -> None:
    encoding = load_encoding(golden / "small" / "mini.tiktoken")
    found = benchmark.measure(encoding, 6, 1)
    assert min(found.values()) > 0
    assert set(found) == {
        "sample", "full sorts", "flat", "greedy", "top_k 50", "top_p 1", "logprobs", "free", "held",
        "full sorts / sample", "held / free",
    }  # fmt: skip
