"""report.html: everything of a run, whatever characters its files hold."""

from __future__ import annotations

import json
from pathlib import Path

from qwen_ds.train.observe.run_page import write_report


def test_the_page_shows_the_run_and_trusts_no_text_in_it(tmp_path: Path) -> None:
    run = tmp_path / "run <1>"
    run.mkdir()
    rows = [
        {"step": 1, "loss": 3.25, "lr": 1e-3}, {"step": 2, "loss": 2.123456789, "lr": 1e-3},
        {"step": 2, "eval_loss": 2.5},
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "data_report.json").write_text(json.dumps({"rows": 3, "sample": "<b>\u4f60</b>"}))
    (run / "recipe.yaml").write_text("seed: 42  # <script>\n")
    write_report(run, "2 steps", "8 trainable of 9 parameters")
    page = (run / "report.html").read_text(encoding="utf-8")
    for text in ("run &lt;1&gt;", "2 steps", "8 trainable", "&lt;b&gt;\u4f60", "&lt;script&gt;"):
        assert text in page, text
    assert "<script>" not in page and "data:image/png;base64," in page
    assert "<th>loss</th><td>2.12346</td>" in page and "<th>step</th><td>2</td>" in page
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
