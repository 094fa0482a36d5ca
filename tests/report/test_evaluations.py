"""Evaluations in a run folder: found, put side by side, and compared row by row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_ds.report.evaluations import MAX_EVALUATIONS, find, is_better, scores_of, tables
from qwen_ds.report.folder import read_run
from tests.report.runs import make_evaluation, make_run, write_object


def test_scores_have_full_names_and_intervals() -> None:
    found = scores_of({
        "seed": {"rouge-l": {"f": 0.3, "p": 0.2, "r": 0.4}, "bleu-4": 0.1},
        "sacrebleu-zh": {"bleu": 12.5, "chrf": None},
        "stop_rate": 1.0,
        "sampling": {"temperature": 0.8},
        "finish_reasons": {"stop": 3},
        "signatures": {"rouge-score": "tok:jieba"},
        "intervals": {"seed.rouge-l": [0.25, 0.35], "rouge-score.rouge-1": [0.1, 0.2]},
    })  # fmt: skip
    assert {name: (s.value, s.low, s.high) for name, s in found.items()} == {
        "seed.rouge-l": (0.3, 0.25, 0.35),
        "seed.bleu-4": (0.1, None, None),
        "sacrebleu-zh.bleu": (12.5, None, None),
        "sacrebleu-zh.chrf": (None, None, None),
        "stop_rate": (1.0, None, None),
    }


def test_the_scores_of_an_earlier_version_are_read() -> None:
    assert list(scores_of({"rouge_score": {"rouge-1": {"f": 0.2, "p": 1, "r": 1}}})) == [
        "rouge_score.rouge-1"
    ]


def test_evaluations_on_the_same_data_stand_side_by_side_the_base_first(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", changes={"model.path": "models/base"})
    make_evaluation(folder / "eval_after", [0.5, 0.6, 0.55], "models/base", "runs/x/adapter")
    make_evaluation(folder / "eval_before", [0.1, 0.2, 0.1], "models/base")
    run = read_run(folder)
    (table,) = tables(run, find(run))
    assert [e.model for e in table.evaluations] == ["base", "adapter"]
    assert [e.is_base for e in table.evaluations] == [True, False]
    assert table.heads == ["base (eval_before)", "adapter (eval_after)"]
    (verdicts,) = table.verdicts
    assert verdicts["seed.rouge-l"].difference == pytest.approx(0.55 - 0.4 / 3)
    assert verdicts["seed.rouge-l"].is_significant and not verdicts["stop_rate"].is_significant
    assert run.troubles == []


def test_other_data_are_another_table(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    make_evaluation(folder / "one", [0.5], "base")
    make_evaluation(folder / "other", [0.5], "base", text="2")
    run = read_run(folder)
    assert len(tables(run, find(run))) == 2


def test_other_rows_are_not_compared(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    make_evaluation(folder / "one", [0.5, 0.4], "base")
    make_evaluation(folder / "other", [0.5, 0.4, 0.9], "base")
    run = read_run(folder)
    (table,) = tables(run, find(run))
    assert table.verdicts == [{}]


def test_one_call_that_compared_models_keeps_its_order_and_its_verdicts(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for name in ("alpha", "beta"):
        make_evaluation(folder / "compared" / name, [0.5, 0.6], "models/x")
    told = {"difference": 0.125, "low": 0.1, "high": 0.2, "p": 0.004}
    comparison = {"models": ["beta", "alpha"], "paired": {"seed.bleu-4": {"alpha": told}}}
    write_object(folder / "compared" / "comparison.json", comparison)
    run = read_run(folder)
    (table,) = tables(run, find(run))
    # By the names of that call, whatever the models are called.
    assert [e.model for e in table.evaluations] == ["beta", "alpha"]
    assert table.heads == ["beta", "alpha"] and table.title == "dev.jsonl"
    (verdicts,) = table.verdicts
    assert verdicts["seed.bleu-4"].p == 0.004 and list(verdicts) == ["seed.bleu-4"]


def test_answers_that_were_given_have_the_name_of_their_folder(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    make_evaluation(folder / "gate", [0.5], "base")
    file = folder / "gate" / "metrics.json"
    write_object(file, json.loads(file.read_text()) | {"data": [], "model": None})
    run = read_run(folder)
    (table,) = tables(run, find(run))
    assert table.title == "gate"


def test_a_file_of_that_name_that_is_no_evaluation_is_passed_over(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_object(folder / "mine" / "metrics.json", {"accuracy": 1})
    write_object(folder / "broken" / "metrics.json", {"seed": {"rouge-l": {"p": 1}}})
    run = read_run(folder)
    assert find(run) == []
    (line,) = run.troubles
    assert line.startswith("broken/metrics.json: its values are not as expected (KeyError: 'f')")


def test_of_very_many_the_newest_are_shown_and_the_page_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for number in range(MAX_EVALUATIONS + 1):
        make_evaluation(folder / f"eval_{number:02d}", [0.5], "base")
    run = read_run(folder)
    assert len(find(run)) == MAX_EVALUATIONS and "13 evaluations" in run.troubles[0]


def test_which_way_is_better_depends_on_the_measure() -> None:
    found = [
        is_better(*pair)
        for pair in (("seed.rouge-l", 0.1), ("perplexity", 0.1), ("repetition_rate", -0.1),
                     ("length_ratio", 0.1), ("seed.rouge-l", 0.0), ("stop_rate", -0.1))
    ]  # fmt: skip
    assert found == [True, False, True, None, None, False]
