"""Sections of a run's page: data, figures at the top, environment, commands."""

from __future__ import annotations

from pathlib import Path

from qwen_ds.report import sections
from qwen_ds.report.folder import RunFiles, read_run
from tests.report.runs import data_report, make_run, write_object


def run_with(folder: Path, **data: object) -> RunFiles:
    run = make_run(folder / "run")
    write_object(run / "data_report.json", data_report() | data)
    return read_run(run)


def test_the_data_page_has_sets_fates_charts_and_findings(tmp_path: Path) -> None:
    page = sections.data_page(run_with(tmp_path))
    assert [(s.use, s.path, s.read, s.targets) for s in page.sets] == [
        ("training", "train.jsonl", 2_000, 80_000)
    ]
    assert [(f.fate, f.reason, f.rows, f.share) for f in page.fates] == [
        ("cut", "answer cut", 120, 0.06), ("dropped", "no answer", 10, 0.005),
    ]  # fmt: skip
    assert len(page.charts) == 2 and "target tokens" in page.charts[1]
    assert [f["finding"] for f in page.findings] == ["mojibake", "near duplicates"]


def test_a_bound_is_marked_where_it_cut_something(tmp_path: Path) -> None:
    charts = sections.data_page(run_with(tmp_path)).charts
    assert "data.max_answer_tokens: 254" in charts[1] and "data.max_tokens" not in charts[0]


def test_the_evaluation_rows_have_their_own_lines(tmp_path: Path) -> None:
    page = sections.data_page(run_with(tmp_path, eval=data_report()))
    assert [each.use for each in page.sets] == ["training", "evaluation"]
    assert len(page.charts) == 4 and len(page.fates) == 4


def test_a_report_of_an_earlier_version_has_no_charts(tmp_path: Path) -> None:
    page = sections.data_page(run_with(tmp_path, lengths=None, findings=None))
    assert page.charts == [] and page.findings == [] and page.sets


def test_a_broken_part_costs_nothing_but_itself(tmp_path: Path) -> None:
    run = run_with(tmp_path, lengths={"edges": [1], "rows": [1, 2], "targets": []})
    page = sections.data_page(run)
    assert page.charts == [] and page.sets and page.findings
    (line,) = run.troubles
    assert line.startswith("data_report.json: its values are not as expected (ValueError: 1 edges")


def test_rows_of_none_that_were_read_cost_their_table_alone(tmp_path: Path) -> None:
    run = run_with(tmp_path, total={**data_report()["total"], "read": 0})
    page = sections.data_page(run)
    assert page.fates == [] and page.sets and len(page.charts) == 2
    (line,) = run.troubles
    assert line.startswith("data_report.json: its values are not as expected (ZeroDivisionError")


def test_the_cards_hold_what_is_known(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    found = {name: value for value, name in sections.cards(run)}
    assert found.pop("last training loss") == f"{run.steps[-1]['loss']:.4g}"
    mean = sum(row["tokens_per_second"] for row in run.steps) / 30  # all took equally long
    assert found.pop("tokens per second") == f"{mean:,.0f}"
    assert found == {
        "optimizer steps": "30",
        "time, all starts": "38 s",
        "best evaluation loss": "0.9",
        "peak memory of rank 0": "21.5 GB",
        "trainable parameters": "10.2 M",
    }


def test_counts_are_read_at_a_glance() -> None:
    assert [sections.millions(n) for n in (36_864, 10_158_080, 7.7e9)] == [
        "36,864", "10.2 M", "7.7 B",
    ]  # fmt: skip


def test_the_commands_leave_out_what_the_launcher_adds(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    assert sections.started_as(run) == "launch/train.py --optim.lr 3e-4"
    assert sections.repeated_by(run) == (
        "deepspeed --num_gpus 8 launch/train.py --config runs/run/recipe.yaml --output_dir "
        "runs/run-again"
    )
    assert "command" not in dict(sections.environment(run))


def test_one_rank_needs_no_launcher_and_odd_names_are_quoted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", changes={"output_dir": "my runs/x"})
    write_object(folder / "environment.json", {"ranks": 1})
    assert sections.repeated_by(read_run(folder)) == (
        "python launch/train.py --config 'my runs/x/recipe.yaml' --output_dir 'my runs/x-again'"
    )
