"""python -m qwen_ds.report: which page is written, and what is refused in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qwen_ds.errors import UserError
from qwen_ds.report.__main__ import MAX_RUNS, main
from tests.report.runs import make_evaluation, make_run


def report(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, words)])
    assert main() == 0


def test_the_page_of_a_run_takes_in_evaluations_made_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    report(monkeypatch, run)
    page = run / "report.html"
    assert "seed.rouge-l" not in page.read_text(encoding="utf-8")
    make_evaluation(run / "eval", [0.5], "m")
    report(monkeypatch, run)
    assert "seed.rouge-l" in page.read_text(encoding="utf-8")
    assert f"{page}: 1 run, " in capsys.readouterr().out


def test_several_runs_are_compared_beside_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    report(monkeypatch, *runs)
    assert (tmp_path / "comparison.html").is_file()
    with pytest.raises(UserError, match="comparison.html: exists; expected a new file"):
        report(monkeypatch, *runs)
    report(monkeypatch, *runs, "--overwrite", "true")
    report(monkeypatch, *runs, "--output", tmp_path / "page.html")
    assert (tmp_path / "page.html").is_file() and not (runs[0] / "report.html").exists()


def test_a_run_under_way_gets_a_page_elsewhere_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report.html in it would mark it as finished."""
    run = make_run(tmp_path / "run")
    (run / "adapter").rmdir()
    with pytest.raises(UserError, match="expected a finished run, or --output FILE"):
        report(monkeypatch, run)
    report(monkeypatch, run, "--output", tmp_path / "now.html")
    assert "The run is not finished" in (tmp_path / "now.html").read_text(encoding="utf-8")
    assert not (run / "report.html").exists()


def test_what_cannot_be_read_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    (run / "environment.json").write_text("{")
    report(monkeypatch, run)
    assert capsys.readouterr().err.startswith("note: environment.json: not readable as JSON")


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], "runs"),
        (["{run}", "{run}/."], "a run was given twice"),
        (["{run}"] * (MAX_RUNS + 1), f"{MAX_RUNS + 1} runs; expected at most {MAX_RUNS}"),
        (["{run}/adapter"], "neither recipe.yaml nor metrics.jsonl"),
        (["{run}/nowhere"], "no such folder; expected the folder of a run"),
        (["{run}", "--output", "{run}/metrics.jsonl", "--overwrite", "true"], "no input"),
        (["{run}", "--output", "{run}"], "a folder; expected the name of a file"),
        (["{run}", "--outputs", "x"], "outputs"),
    ],
)
def test_mistakes_are_errors_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str
) -> None:
    run = make_run(tmp_path / "run")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=expected) as caught:
        report(monkeypatch, *(word.format(run=run) for word in words))
    assert "\n" not in str(caught.value) and (run / "metrics.jsonl").read_bytes() == before
