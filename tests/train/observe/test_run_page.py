"""loss.png and report.html of a finished run, which are made from its folder alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ds.train.observe.run_page import write_report
from tests.report.runs import losses, make_run, write_lines


def test_a_finished_run_gets_its_curve_and_its_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run <1>", steps=4)
    write_report(run)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<h1>run &lt;1&gt;</h1>" in (run / "report.html").read_text(encoding="utf-8")


def test_the_page_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It marks a finished run: without the curve there is none."""
    run = make_run(tmp_path / "run", steps=4)
    (run / "loss.png").mkdir()  # nothing can be written under that name
    with pytest.raises(OSError):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_broken_file_is_said_and_costs_no_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", steps=4)
    write_lines(run / "metrics.jsonl", losses(3))
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "los')
    write_report(run)
    assert (
        "report.html: metrics.jsonl: no JSON object in line 4; left out" in capsys.readouterr().out
    )
    assert (run / "report.html").is_file()
