"""The benchmark of adapters runs through on a tiny shape; its figures mean nothing there."""

from __future__ import annotations

import pytest

from qwen_ds.model.configuration import QWenConfig
from serve.engine import adapted
from tests.benchmarks import serve_adapters as benchmark


@pytest.mark.filterwarnings("ignore")
def test_every_way_reports_its_seconds() -> None:
    config = QWenConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, kv_channels=8,
        intermediate_size=32, seq_length=256,
    )  # fmt: skip
    before = adapted.SIDE_BY_SIDE
    found = benchmark.measure(config, rank=2, adapters=3, rounds=2)
    assert list(found) == ["bare", "beside", "one", "several", "gathered"]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found.values())
    assert benchmark.ratio(found, "bare") == 1 and before == adapted.SIDE_BY_SIDE
