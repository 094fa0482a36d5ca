"""What a run shows afterwards: the loss curve as a picture, and one page with everything on it."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def write_report(folder: Path, summary: str, parameters: str) -> None:
    """Write loss.png and report.html from metrics.jsonl, data_report.json and recipe.yaml in the run folder."""
    rows = read_metrics(folder)
    draw_loss(rows, folder / "loss.png")
    picture = base64.b64encode((folder / "loss.png").read_bytes()).decode()
    data_report = json.loads((folder / "data_report.json").read_text(encoding="utf-8"))
    last: dict[str, Any] = next((row for row in reversed(rows) if "loss" in row), {})
    numbers = "".join(
        f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(f'{v:.6g}' if isinstance(v, float) else str(v))}</td></tr>"
        for k, v in last.items()
    )
    unfinished = folder / ".report.html.unfinished"
    unfinished.write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(folder.name)}</title>
<style>body{{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}}pre{{background:#f4f4f4;padding:1em;
overflow:auto}}th{{text-align:left;padding-right:1.5em;font-weight:normal;color:#555}}img{{max-width:100%}}</style>
<h1>{html.escape(folder.name)}</h1><p>{html.escape(summary)}</p><p>{html.escape(parameters)}</p>
<img alt="loss curve" src="data:image/png;base64,{picture}"><h2>Last step</h2><table>{numbers}</table>
<h2>Data</h2><pre>{html.escape(json.dumps(data_report, indent=2, ensure_ascii=False))}</pre>
<h2>Recipe</h2><pre>{html.escape((folder / "recipe.yaml").read_text(encoding="utf-8"))}</pre></html>
""",
        encoding="utf-8",
    )
    unfinished.replace(folder / "report.html")  # written last, at once: it marks a finished run


def draw_loss(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss per learnt token over optimizer steps, training and evaluation, as a PNG."""
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
    axes.set_ylabel("loss per learnt token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
