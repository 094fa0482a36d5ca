"""Sides compared on the same rows: planted differences are found, and none where there is none."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from qwen_ds.errors import UserError
from serve.options import EvaluateOptions, parse
from serve.scores.report import evaluate
from tests.serve.files.test_prediction import read_lines, write_rows

REFERENCES = [f"第{i}条裙子，{'简约' if i % 2 else '飘逸'}大方，适合夏天。" for i in range(60)]


def answers(folder: Path, name: str, wrong: int, **more: Any) -> str:
    """A file of predictions of which so many are wrong, each for its own rows."""
    rng = random.Random(name)
    bad = set(rng.sample(range(len(REFERENCES)), wrong))
    rows = [
        {"prediction": "不知道" if i in bad else text, "reference": text, "prompt": f"q{i}", **more}
        for i, text in enumerate(REFERENCES)
    ]
    return f"{name}={write_rows(folder / f'{name}.jsonl', rows)}"


def compared(out: Path, *files: str, more: tuple[str, ...] = ()) -> dict[str, Any]:
    words = ["--output_dir", str(out), "--resamples", "300", "--predictions", *files, *more]
    report = evaluate(parse(EvaluateOptions, "", words))
    assert report is not None
    return report


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.js*")
    }


def test_a_planted_difference_is_found_and_equal_sides_differ_by_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop, cut = {"finish_reason": "stop"}, {"finish_reason": "length"}
    files = [answers(tmp_path, "old", 25, **cut), answers(tmp_path, "new", 5, **stop)]
    report = compared(tmp_path / "out", *files, files[0].replace("old=", "same="))
    assert report == json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert report["models"] == ["old", "new", "same"] and report["rows"] == 60
    found = report["paired"]["seed.rouge-l"]
    assert found["new"]["low"] > 0 and found["new"]["p"] < 0.01
    assert found["same"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    assert set(report["paired"]["stop_rate"]) == {"new", "same"}
    assert report["scores"]["stop_rate"]["new"] == [1.0, 1.0, 1.0]
    for name in ("old", "new", "same"):
        value, low, high = report["scores"]["seed.rouge-l"][name]
        metrics = json.loads((tmp_path / "out" / name / "metrics.json").read_text())
        assert value == metrics["seed"]["rouge-l"]["f"] and low < value < high
        assert metrics["intervals"]["seed.rouge-l"] == [low, high]
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("seed.rouge-l ")]
    assert line.count("±") == 3 and line.count(" *") == 1
    (stops,) = [line for line in printed.splitlines() if line.startswith("stop_rate ")]
    assert stops.replace(" ±0.0000", "").split() == ["stop_rate", "0.0000", "1.0000", "*", "0.0000"]


def test_sides_of_equal_quality_do_not_differ(tmp_path: Path) -> None:
    files = [answers(tmp_path, name, 15) for name in ("one", "other")]
    report = compared(tmp_path / "out", *files)
    found = report["paired"]["seed.rouge-l"]["other"]
    assert found["low"] < 0 < found["high"] and found["p"] > 0.05


def test_the_same_call_gives_the_same_bytes(tmp_path: Path) -> None:
    files = [answers(tmp_path, "old", 25), answers(tmp_path, "new", 5)]
    for out in ("a", "b"):
        compared(tmp_path / out, *files)
    one, other = (contents(tmp_path / out) for out in ("a", "b"))
    assert one == other and len(one) == 5


def test_each_row_has_its_scores_and_the_extremes_are_named(tmp_path: Path) -> None:
    report = compared(tmp_path / "out", answers(tmp_path, "x", 2))
    rows = read_lines(tmp_path / "out" / "rows.jsonl")
    bad = [row["id"] for row in rows if row["seed.rouge-l"] < 0.5]
    assert len(rows) == 60 and len(bad) == 2
    assert report["worst"][:2] == bad and not set(report["best"]) & set(bad)
    assert report["ranked_by"] == "seed.rouge-l" and rows[0]["source"].endswith("x.jsonl:1")
    mean = sum(row["seed.rouge-l"] for row in rows) / 60
    assert report["seed"]["rouge-l"]["f"] == pytest.approx(mean, abs=1e-6)


def test_other_rows_are_not_compared(tmp_path: Path) -> None:
    whole = answers(tmp_path, "whole", 1)
    less = write_rows(tmp_path / "less.jsonl", [{"prediction": "a", "reference": REFERENCES[0]}])
    with pytest.raises(UserError, match="less has 1 rows and whole 60; expected answers to the"):
        compared(tmp_path / "out", whole, str(less))
    rows = read_lines(tmp_path / "whole.jsonl")
    for key in ("prompt", "reference"):
        changed = [*rows[:3], rows[3] | {key: "another"}, *rows[4:]]
        other = write_rows(tmp_path / f"{key}.jsonl", changed)
        with pytest.raises(UserError, match=f"row 4 of {key} has another {key} than that of whole"):
            compared(tmp_path / "out", whole, str(other))
    assert not (tmp_path / "out").exists()


def test_several_references_are_read_from_predictions_and_from_data(tmp_path: Path) -> None:
    rows = [{"prediction": "二", "reference": "一", "references": ["一", "二"], "more": "三"}]
    report = compared(tmp_path / "a", str(write_rows(tmp_path / "p.jsonl", rows)))
    assert report["exact_match"] == 1.0
    rows[0]["prediction"] = "三"
    file = str(write_rows(tmp_path / "p.jsonl", rows))
    assert compared(tmp_path / "b", file)["exact_match"] == 0.0
    more = ("--references", "more")
    assert compared(tmp_path / "c", file, more=more)["exact_match"] == 1.0
    data = write_rows(tmp_path / "d.jsonl", [{"content": "q", "summary": ["四", "三"]}])
    more = ("--data", str(data), "--references", "summary")
    assert compared(tmp_path / "d", file, more=more)["exact_match"] == 1.0
    for more in (
        ("--references", "mroe"),
        ("--data", str(data), "--references", "mroe", "summary"),
    ):
        with pytest.raises(UserError, match="--references mroe: no row has it"):
            compared(tmp_path / "e", file, more=more)


def test_a_gate_is_for_all_but_the_first(tmp_path: Path) -> None:
    files = [answers(tmp_path, "old", 25), answers(tmp_path, "new", 0)]
    more = ("--require", "exact_match>=1", "old:exact_match<0.9")
    report = compared(tmp_path / "out", *files, more=more)
    assert [(one["model"], one["met"]) for one in report["gate"]] == [("new", True), ("old", True)]
    report = compared(tmp_path / "one", files[0], more=more[:2])
    assert [(one["value"], one["met"]) for one in report["gate"]] == [(35 / 60, False)]


def test_answers_that_stand_in_the_training_rows_are_counted(tmp_path: Path) -> None:
    rows = [{"content": f"q{i}", "summary": f" {text}\n"} for i, text in enumerate(REFERENCES[:30])]
    training = write_rows(tmp_path / "train.jsonl", [*rows, {"content": "no answer"}])
    file = answers(tmp_path, "x", 0)
    report = compared(tmp_path / "out", file, more=("--training", str(training)))
    assert report["verbatim_share"] == 0.5
    assert "verbatim_share" not in compared(tmp_path / "without", file)
    empty = write_rows(tmp_path / "empty.jsonl", [{"content": "q", "summary": ""}])
    with pytest.raises(UserError, match=r"--training .*empty\.jsonl: no answers; expected"):
        compared(tmp_path / "none", file, more=("--training", str(empty)))
