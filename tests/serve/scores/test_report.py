"""Evaluation: what it writes and prints, and that scoring a file gives what generating gave."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest

from qwen_ds.errors import UserError
from serve.files.parts import held_output
from serve.options import EvaluateOptions, parse
from serve.scores.answers import scored_row
from serve.scores.profiles import measure
from serve.scores.report import evaluate
from serve.scores.words import sample
from tests.serve.files.test_prediction import read_lines, write_rows

ROWS = [{"content": f"类型#裙*第{i}", "summary": f"第{i}条裙子，简约大方。"} for i in range(5)]


FILES = ["metrics.json", "predictions.jsonl", "rows.jsonl", "speed.json"]


def options_for(output_dir: Path, *more: str) -> EvaluateOptions:
    return parse(
        EvaluateOptions, "", ["--output_dir", str(output_dir), "--max_new_tokens", "6", *more]
    )


def test_a_model_is_scored_on_its_answers(
    small_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    report = evaluate(
        options_for(tmp_path / "eval", "--model", str(small_dir), "--data", str(data))
    )
    assert report == json.loads((tmp_path / "eval" / "metrics.json").read_text(encoding="utf-8"))
    assert report is not None
    lines = read_lines(tmp_path / "eval" / "predictions.jsonl")
    assert [line["reference"] for line in lines] == [row["summary"] for row in ROWS]
    rows = [scored_row(line) for line in lines]
    assert all(row.reference_nll and row.reference_tokens for row in rows)
    scores = measure(rows)
    for one in scores:
        assert one.as_dict().items() <= (report[one.profile] if one.profile else report).items()
    profiles = [one.profile for one in scores if one.profile]
    assert report["seed"]["bleu-4"] > 0 and report["perplexity"] > 1
    assert report["rows"] == sum(report["finish_reasons"].values()) == 5
    assert report["completion_tokens"] == sum(line["completion_tokens"] for line in lines)
    assert report["empty_predictions"] == sum(line["prediction"].strip() == "" for line in lines)
    speed = json.loads((tmp_path / "eval" / "speed.json").read_text(encoding="utf-8"))
    assert speed["tokens_per_second"] == pytest.approx(
        report["completion_tokens"] / speed["seconds"], rel=0.01
    )
    assert speed["rows_of_this_run"] == 5 and not set(speed) & set(report)
    assert report["sampling"]["do_sample"] is False

    printed = capsys.readouterr().out
    low, high = report["intervals"]["seed.bleu-4"]
    told = f"{report['seed']['bleu-4']:>9.4f}  {low:.4f} to {high:.4f}"
    assert f"{'seed.bleu-4':<28}{told}" in printed
    for title, shown in (("best", 4), ("best", 2), ("worst", 0), ("worst", 1)):  # all scores are 0
        row = ROWS[shown]
        asked = f"{title}: {data}:{shown + 1}\n  prompt      {row['content']}\n"
        assert f"{asked}  reference   {row['summary']}" in printed

    again = evaluate(
        options_for(
            tmp_path / "again", "--predictions", str(tmp_path / "eval" / "predictions.jsonl")
        )
    )
    assert again is not None
    assert {p: again[p] for p in profiles} == {p: report[p] for p in profiles}
    assert again["perplexity"] == report["perplexity"]
    assert (again["model_sha256"], again["sampling"]) == (None, None), "the file tells of neither"
    assert not (tmp_path / "again" / "speed.json").exists()
    with pytest.raises(UserError, match=r"metrics\.json: exists"):
        evaluate(options_for(tmp_path / "eval", "--model", str(small_dir), "--data", str(data)))
    (tmp_path / "eval" / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"predictions\.jsonl: exists; .*--predictions"):
        evaluate(options_for(tmp_path / "eval", "--model", str(small_dir), "--data", str(data)))


def test_references_may_come_from_the_data(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    predictions = write_rows(
        tmp_path / "p.jsonl",
        [{"prediction": row["summary"]} for row in ROWS[:4]] + [{"prediction": ""}],
    )
    report = evaluate(
        options_for(tmp_path / "eval", "--predictions", str(predictions), "--data", str(data))
    )
    assert report is not None
    assert report["empty_predictions"] == 1
    assert report["seed"]["rouge-l"]["r"] == pytest.approx(0.8)
    report = evaluate(
        options_for(
            tmp_path / "front",
            "--predictions",
            str(predictions),
            "--data",
            str(data),
            "--limit",
            "2",
        )
    )
    assert report is not None
    assert (report["rows"], report["seed"]["rouge-l"]["r"]) == (2, 1.0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prediction": "a", "reference": "b"}, {"predict": "a"}],
            r"p\.jsonl:2: found predict; expected",
        ),
        ([{"prediction": "a", "reference": "b"}, {"prediction": "a"}], r"p\.jsonl:2: no reference"),
        ([{"prediction": "a", "reference": " "}], r"p\.jsonl:1: no reference"),
    ],
)
def test_predictions_that_cannot_be_scored_are_named(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(
            options_for(
                tmp_path / "e", "--predictions", str(write_rows(tmp_path / "p.jsonl", rows))
            )
        )
    assert not (tmp_path / "e").exists()


def test_what_is_missing_is_named(small_dir: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [ROWS[0], {"content": "类型#裙"}])
    with pytest.raises(UserError, match=r"rows\.jsonl:2: no answer; expected one to compare with"):
        evaluate(options_for(tmp_path / "e", "--model", str(small_dir), "--data", str(data)))
    with pytest.raises(UserError, match="no model or no data given; expected --model"):
        evaluate(options_for(tmp_path / "e", "--data", str(data)))
    with pytest.raises(UserError, match="no such file"):
        evaluate(options_for(tmp_path / "e", "--predictions", str(tmp_path / "none.jsonl")))
    two = write_rows(tmp_path / "p.jsonl", [{"prediction": "a"}] * 3)
    with pytest.raises(UserError, match="3 predictions; expected 2"):
        evaluate(options_for(tmp_path / "e", "--predictions", str(two), "--data", str(data)))
    assert not (tmp_path / "e").exists()


def test_an_evaluation_stopped_while_scoring_goes_on_from_its_answers(
    small_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same command; other settings are refused, and a finished result stays."""
    data, out = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "e"
    words = ("--model", str(small_dir), "--data", str(data))

    def stopped(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("serve.scores.scored.measure", stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluate(options_for(out, *words))
    answers = (out / "predictions.jsonl").read_bytes()
    with pytest.raises(UserError, match="interrupted run with seed"):
        evaluate(options_for(out, *words, "--seed", "7"))
    with monkeypatch.context() as patch:
        patch.setattr("serve.files.sources.load_engine", stopped)
        report = evaluate(options_for(out, *words))
    assert report is not None and report["rows"] == 5
    assert (out / "predictions.jsonl").read_bytes() == answers
    assert sorted(path.name for path in out.iterdir()) == FILES
    with pytest.raises(UserError, match=r"metrics\.json: exists"):
        evaluate(options_for(out, *words))


def test_two_evaluations_do_not_share_an_output(small_dir: Path, tmp_path: Path) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "e"
    told = rf"metrics\.json is being written by process {os.getpid()} on "
    for given in (("--model", str(small_dir), "--data", str(data)), ("--predictions", str(data))):
        with held_output(out / "metrics.json"), pytest.raises(UserError, match=told):
            evaluate(options_for(out, *given))
        assert not out.exists()


@pytest.mark.parametrize("given", ["--predictions", "--data"])
def test_an_output_folder_that_cannot_be_made_is_named_before_anything_is_read(
    small_dir: Path, tmp_path: Path, given: str
) -> None:
    (tmp_path / "e").touch()
    more = (given, str(tmp_path / "none.jsonl"), "--model", str(small_dir))
    with pytest.raises(UserError, match=r"e: a file; expected a folder to write in"):
        evaluate(options_for(tmp_path / "e", *more))
    (tmp_path / "f" / "metrics.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"metrics\.json: a folder; expected the name of a file"):
        evaluate(options_for(tmp_path / "f", *more, "--overwrite"))


def test_chinese_text_is_wrapped_by_the_columns_it_takes() -> None:
    answer = {"prompt": "问", "reference": "a" + "裙" * 20, "prediction": ""}
    text = sample({"source": "f:1", **answer}, columns=44)
    assert text.splitlines() == [
        "f:1",
        "  prompt      问",
        "  reference   a" + "裙" * 14,
        "              " + "裙" * 6,
        "  prediction  (empty)",
    ]


def test_scores_stopped_while_they_are_written_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same command, without --overwrite; a complete result is not touched."""
    rows = [{"prediction": row["summary"], "reference": row["summary"]} for row in ROWS]
    files = [str(write_rows(tmp_path / name, rows)) for name in ("a.jsonl", "b.jsonl")]
    out = tmp_path / "out"

    def stopped(file: Path, _: object) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("serve.scores.outputs.write_json", stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluate(options_for(out, "--predictions", *files))
    assert (out / "a" / "rows.jsonl").is_file() and not (out / "comparison.json").exists()
    assert evaluate(options_for(out, "--predictions", *files)) is not None
    assert sorted(file.name for file in out.iterdir()) == ["a", "b", "comparison.json"]
    with pytest.raises(UserError, match=r"comparison\.json: exists"):
        evaluate(options_for(out, "--predictions", *files))
    (out / "comparison.json").unlink()
    with pytest.raises(UserError, match=r"rows\.jsonl: exists; expected a new --output_dir"):
        evaluate(options_for(out, "--predictions", *files))
    assert evaluate(options_for(out, "--predictions", *files, "--overwrite")) is not None


def test_answers_that_are_scored_are_no_output(tmp_path: Path) -> None:
    rows = [{"prediction": "a", "reference": "b"}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"rows\.jsonl: this command reads .*expected an output"):
        evaluate(options_for(tmp_path, "--predictions", str(file), "--overwrite"))
    assert read_lines(file) == rows
