"""The training benchmark runs to its end on a tiny shape; collectives move what is predicted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import scaling, train


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


@pytest.mark.job
def test_real_collectives_move_the_bytes_that_are_predicted() -> None:
    """Two ranks, each stage, gradients of an adapter over several micro-batches."""
    found = scaling.measured(2)
    assert found.keys() == scaling.CASES.keys()
    for case, kinds in found.items():
        assert kinds == pytest.approx(scaling.predicted(case, 2), rel=1e-3), case
