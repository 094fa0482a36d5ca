"""Curves of training: of one run, or of several on each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from markupsafe import Markup

from qwen_ds.page.charts import Curve, curves
from qwen_ds.report.folder import RunFiles, series

STEP = "optimizer step"
LOSS = "loss per target token (nats)"
# Of so many logged steps the mean is drawn, and the single values behind it.
MEAN_FROM, MEAN_SHARE = 100, 0.03


def of_one_run(run: RunFiles) -> list[Markup]:
    """Loss, learning rate, gradient norm, throughput, memory, padding and, where it is known, MFU;
    of a long run the values of the steps lie behind their mean."""
    loss = _with_mean(run, "loss", "training")
    loss.append(Curve("evaluation", *series(run.evals, "eval_loss"), "points", colour=1))
    drawn = [curves(loss, STEP, LOSS)]
    for key, title, is_noisy in _CURVES:
        of = _with_mean(run, key, "logged steps") if is_noisy else [_curve(run, key)]
        drawn.append(curves(of, STEP, title, from_zero=True))
    return [chart for chart in drawn if chart]


# Key in metrics.jsonl, title, whether it differs from step to step.
_CURVES = (
    ("lr", "learning rate", False),
    ("grad_norm", "gradient norm", True),
    ("tokens_per_second", "tokens per second, all ranks", True),
    ("memory_gb", "peak memory of rank 0 (GB)", False),
    ("reserved_gb", "memory that torch holds on rank 0's GPU, peak (GB)", False),
    ("alloc_retries", "allocations that had to be tried again on rank 0", False),
    ("mfu", "share of the GPUs' peak (MFU)", True),
    ("padding_share", "share of padding", True),
)


def _curve(run: RunFiles, key: str, name: str = "") -> Curve:
    return Curve(name, *series(run.steps, key))


def _mean(run: RunFiles, key: str, name: str = "") -> Curve:
    """The rolling mean of a long run, the values of a short one."""
    xs, ys = series(run.steps, key)
    return Curve(name, xs, rolling_mean(ys, _window(ys)) if len(ys) >= MEAN_FROM else ys, colour=0)


def _window(values: Sequence[float]) -> int:
    return max(3, round(len(values) * MEAN_SHARE))


def _with_mean(run: RunFiles, key: str, name: str) -> list[Curve]:
    xs, ys = series(run.steps, key)
    if len(xs) < MEAN_FROM:
        return [Curve(name, xs, ys)]
    mean = _mean(run, key, f"mean over {_window(ys)}")
    return [Curve(name, xs, ys, "faint", colour=0), mean]


def of_several_runs(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Markup]:
    """The same curves of all runs on each other; of long runs the means."""

    def drawn(title: str, of: Callable[[RunFiles], Curve], from_zero: bool = False) -> Markup:
        found = [
            replace(of(run), name=name, colour=colour)
            for colour, (run, name) in enumerate(zip(runs, names, strict=True))
        ]
        return curves(found, STEP, title, from_zero=from_zero)

    def evaluation(run: RunFiles) -> Curve:
        return Curve("", *series(run.evals, "eval_loss"), "points")

    charts = [
        drawn(f"training {LOSS}", partial(_mean, key="loss")),
        drawn(f"evaluation {LOSS}", evaluation),
    ]
    for key, title, is_noisy in _CURVES:
        charts.append(drawn(title, partial(_mean if is_noisy else _curve, key=key), from_zero=True))
    return [chart for chart in charts if chart]


def rolling_mean(values: Sequence[float], of: int) -> list[float]:
    """Mean of the `of` values around each, of fewer at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    at = np.arange(len(values))
    low, high = np.maximum(at - of // 2, 0), np.minimum(at + of - of // 2, len(values))
    means: list[float] = ((sums[high] - sums[low]) / (high - low)).tolist()
    return means
