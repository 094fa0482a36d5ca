"""The pictures of a finished run: loss.png, the curve, and report.html, with everything on it."""

from __future__ import annotations

from pathlib import Path

from qwen_ds.disk.write import replacing
from qwen_ds.report import one_run
from qwen_ds.report.folder import RunFiles, read_run, series
from qwen_ds.runlog import say


def write_report(folder: Path) -> None:
    """Write loss.png and report.html into the run folder, from the other files there, and say what
    is broken in them."""
    run = read_run(folder)
    draw_loss(run, folder / "loss.png")
    # Last, and complete or absent: this file marks a finished run.
    one_run.write_page(run, folder / one_run.PAGE)
    for line in run.troubles:
        say(f"report.html: {line}")


def draw_loss(run: RunFiles, path: Path) -> None:
    """Draw training and evaluation loss over the optimizer steps, as a PNG."""
    # The figure class and not pyplot: no display, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    training, evaluation = series(run.steps, "loss"), series(run.evals, "eval_loss")
    if training[0]:
        axes.plot(*training, label="training", linewidth=1.2)
    if evaluation[0]:
        axes.plot(*evaluation, label="evaluation", marker="o", markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per target token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png")
