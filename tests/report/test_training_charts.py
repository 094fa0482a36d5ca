"""Curves of one run, and of several on each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen_ds.report.folder import read_run
from qwen_ds.report.training_charts import of_one_run, of_several_runs, rolling_mean
from tests.report.runs import losses, make_run, write_lines


def test_the_rolling_mean_is_that_of_the_values_around() -> None:
    values = np.random.default_rng(0).normal(size=50).tolist()
    found = rolling_mean(values, 5)
    assert found[0] == pytest.approx(np.mean(values[:3])) and len(found) == 50
    assert found[20] == pytest.approx(np.mean(values[18:23]))
    assert rolling_mean([], 3) == []


def test_a_run_has_a_curve_for_everything_that_was_logged(tmp_path: Path) -> None:
    text = "".join(of_one_run(read_run(make_run(tmp_path / "run"))))
    for title in (
        "loss per target",
        "learning rate",
        "gradient norm",
        "tokens per second",
        "memory",
    ):
        assert title in text
    assert "evaluation" in text and "MFU" not in text


def test_a_long_run_shows_its_steps_behind_their_mean(tmp_path: Path) -> None:
    short = of_one_run(read_run(make_run(tmp_path / "short", steps=30)))
    long = of_one_run(read_run(make_run(tmp_path / "long", steps=300)))
    assert "mean over 9" in long[0] and "mean over" not in short[0]


def test_runs_keep_their_colours_on_all_charts(tmp_path: Path) -> None:
    runs = [
        read_run(make_run(tmp_path / name, eval_losses=e))
        for name, e in (("a", ()), ("b", (1.0, 0.9)))
    ]
    charts = of_several_runs(runs, ["run a", "run b"])
    assert "run a" in charts[0] and "run b" in charts[0]
    # Only the second has evaluations, and its colour is the second one there, too.
    assert "--series-1" in charts[1] and "--series-0" not in charts[1]


def test_without_a_step_there_is_no_chart(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", eval_losses=())
    write_lines(run / "metrics.jsonl", losses(0))
    assert of_one_run(read_run(run)) == []
