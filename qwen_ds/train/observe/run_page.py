"""The pages of a finished run: loss.png, the curve, and report.html, with everything on it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from qwen_ds.disk.read import read_json
from qwen_ds.disk.write import replacing, write_text


def write_report(folder: Path, summary: str, parameters: str) -> None:
    """Write loss.png and report.html into the run folder, from the other files there."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    draw_loss(rows, folder / "loss.png")
    page = Environment(loader=PackageLoader("qwen_ds.train.observe", "."), autoescape=True)
    text = page.get_template("run_page.html.j2").render(
        name=folder.name,
        summary=summary,
        parameters=parameters,
        picture=base64.b64encode((folder / "loss.png").read_bytes()).decode(),
        last=next((row for row in reversed(rows) if "loss" in row), {}),
        data_report=json.dumps(
            read_json(folder / "data_report.json"), indent=2, ensure_ascii=False
        ),
        recipe=(folder / "recipe.yaml").read_text(encoding="utf-8"),
    )
    # Last, and complete or absent: this file marks a finished run.
    write_text(folder / "report.html", text)


def draw_loss(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw training and evaluation loss over the optimizer steps, as a PNG."""
    # The figure class and not pyplot: no display, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    evaluation = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    if training:
        axes.plot(*zip(*training, strict=True), label="training", linewidth=1.2)
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), label="evaluation", marker="o", markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per target token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png")
