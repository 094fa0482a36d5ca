"""Several runs on one page: what was changed, and what came of it."""

from __future__ import annotations

from pathlib import Path

from qwen_ds.report.folder import RunFiles, read_run
from qwen_ds.report.several_runs import distinct_names, page_of
from tests.report.runs import (
    make_evaluation,
    make_run,
    make_whole_run,
    samples,
    write_lines,
    write_object,
)
from tests.report.test_one_run import HOSTILE, Outline


def two(folder: Path) -> list[RunFiles]:
    one = make_run(folder / "r8", changes={"model.path": "b"})
    other = make_run(
        folder / "r64", eval_losses=(1.0, 0.5), changes={"lora.r": 64, "model.path": "b"}
    )
    for run, scores in ((one, [0.2, 0.3] * 10), (other, [0.4, 0.6] * 10)):
        make_evaluation(run / "eval_before", [0.1] * 20, "b")
        make_evaluation(run / "eval", scores, "b", f"{run}/adapter", by=run.name)
    return [read_run(one), read_run(other)]


def test_the_page_shows_what_was_changed_and_what_came_of_it(tmp_path: Path) -> None:
    page = page_of(two(tmp_path))
    outline = Outline(page)
    assert not outline.open and "What was changed" in outline.headings
    assert (
        '<tr><th class="mono">lora.r</th><td class="place">8</td><td class="place">64</td>' in page
    )
    assert "optim.lr" not in page and "output_dir" not in page
    assert {"eval_before: dev.jsonl", "eval: dev.jsonl"} <= {*outline.headings}
    assert "+0.25, p ≤ 0.001" in page and "equal" in page
    assert "r8 (adapter)" in page and "r64 (adapter)" in page and "r64 (base)" in page
    assert outline.headings.count("Answers that differ most, by seed.rouge-l") == 1
    assert page.count("All answers are the same.") == 1, "the base's are"


def test_evaluations_in_folders_of_other_names_meet_by_their_data(tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        folder = make_run(tmp_path / name)
        make_evaluation(folder / f"eval_{name}", [0.5, 0.4], "m", "x/adapter")
        runs.append(read_run(folder))
    assert "eval_a / eval_b: dev.jsonl" in Outline(page_of(runs)).headings


def test_without_a_shared_evaluation_the_page_says_so_and_shows_the_last_samples(
    tmp_path: Path,
) -> None:
    runs = []
    for name in ("a", "b"):
        folder = make_run(tmp_path / name)
        write_lines(folder / "samples.jsonl", samples())
        runs.append(read_run(folder))
    page = page_of(runs)
    assert "No two of the runs have an evaluation" in page and "The recipes are the same." in page
    assert "The last samples" in Outline(page).headings and "春天是第3次回答" in page


def test_other_machines_and_other_rows_are_told(tmp_path: Path) -> None:
    runs = []
    for name, ranks, rows in (("a", 8, 100), ("b", 4, 90)):
        folder = make_run(tmp_path / name)
        write_object(folder / "environment.json", {"ranks": ranks, "command": [name]})
        write_object(folder / "data_report.json", {"rows": rows, "sha256": f"{rows:x}"})
        runs.append(read_run(folder))
    page = page_of(runs)
    assert "training rows, sha256" in page and ">ranks<" in page and ">command<" not in page


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert distinct_names([Path("/r/a"), Path("/r/b")]) == ["a", "b"]
    assert distinct_names([Path("/x/run"), Path("/y/run")]) == ["x/run", "y/run"]


def test_text_of_others_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    runs = [read_run(make_whole_run(tmp_path / name, text=HOSTILE)) for name in ("a", "b<b>")]
    outline = Outline(page_of(runs))
    assert not outline.open and "script" not in outline.found


def test_a_broken_file_is_said_with_the_name_of_its_run(tmp_path: Path) -> None:
    runs = two(tmp_path)
    (runs[1].folder / "environment.json").write_text("{")
    page = page_of([runs[0], read_run(runs[1].folder)])
    assert "r64: environment.json: not readable as JSON" in page
