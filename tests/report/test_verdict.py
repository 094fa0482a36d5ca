"""The verdict in words: each sentence by a rule of docs/report.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen_ds.report.evaluations import find, tables
from qwen_ds.report.folder import read_run
from qwen_ds.report.verdict import Sentence, percent, short, verdict, worst
from tests.report.runs import evals, losses, make_evaluation, make_run, write_lines, write_object

FINE: dict[str, Any] = {"total": {"read": 100, "truncated": {}, "dropped": {}, "skipped": {}}}


def spoken(
    folder: Path,
    eval_losses: Sequence[float | None] = (),
    steps: Sequence[dict[str, Any]] | None = None,
    data: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
) -> list[Sentence]:
    """The verdict on a run with these losses and this data report."""
    run = make_run(folder / "run", changes=changes)
    rows = losses(30) if steps is None else list(steps)
    write_lines(run / "metrics.jsonl", rows + evals(eval_losses))
    write_object(run / "data_report.json", FINE if data is None else data)
    return verdict(read_run(run))


@pytest.mark.parametrize(
    "values, expected, severity",
    [
        ((2.31, 1.5, 1.04), "fell from 2.31 to 1.04, best at step 30; still falling", "good"),
        ((2.31, 1.045, 1.04), "fell from 2.31 to 1.04, best at step 30; level at the end", "good"),
        ((2.0, 1.0, 1.01), "fell from 2 to 1, best at step 20, and has been level since", "good"),
        ((2.0, 1.0, 1.03), "risen by 3 % since, to 1.03: overfitting. The checkpoint", "warn"),
        ((1.0, 1.5), "best at its first value, 1 at step 10; it has risen by 50 %", "warn"),
        ((1.0, 1.01), "stayed level, at 1.", "warn"),
    ],
)  # fmt: skip
def test_the_first_sentence_tells_how_the_evaluation_loss_went(
    tmp_path: Path, values: Sequence[float], expected: str, severity: str
) -> None:
    first = spoken(tmp_path, values)[0]
    assert first.text.startswith("Loss on the evaluation rows ") and expected in first.text
    assert first.severity == severity


def test_an_evaluation_loss_that_is_not_finite_is_grave(tmp_path: Path) -> None:
    found = spoken(tmp_path, (2.0, None, 1.0))
    assert Sentence("1 evaluation gave a loss that is not finite.", "stop") in found


def test_without_evaluation_rows_the_verdict_says_that_nothing_is_known(tmp_path: Path) -> None:
    (only,) = spoken(tmp_path)
    assert only.severity == "note" and "No rows were set aside for evaluation" in only.text
    assert only.text.startswith("Training loss fell from 2.")


def test_one_evaluation_makes_no_trend(tmp_path: Path) -> None:
    (only,) = spoken(tmp_path, (0.9,))
    assert "the one evaluation, after step 10, gave 0.9: eval.every_steps" in only.text


def test_a_training_loss_that_does_not_fall_is_a_warning(tmp_path: Path) -> None:
    steps = [{"step": n, "loss": 2.0} for n in range(1, 20)]
    (only,) = spoken(tmp_path, steps=steps)
    assert only.severity == "warn"
    assert only.text.startswith("Training loss did not fall (from 2 to 2)")


def test_a_training_loss_near_0_means_rows_known_by_heart(tmp_path: Path) -> None:
    steps = [{"step": n, "loss": 2.0 / n**3} for n in range(1, 30)]
    found = spoken(tmp_path, steps=steps)
    assert any("known by heart" in sentence.text for sentence in found)
    assert not any("known by heart" in sentence.text for sentence in spoken(tmp_path / "x"))


def test_a_run_without_a_step_says_so(tmp_path: Path) -> None:
    assert spoken(tmp_path, steps=[])[0].text == "No step with a loss is on record."


@pytest.mark.parametrize("rows, severity", [(1, "note"), (2, "warn")])
def test_rows_that_were_cut_are_counted_and_many_are_a_warning(
    tmp_path: Path, rows: int, severity: str
) -> None:
    total = FINE["total"] | {"truncated": {"answer cut": {"rows": rows, "first": "a:1"}}}
    found = spoken(tmp_path, data={"total": total})[-1]
    assert found.severity == severity
    were = "1 row of 100 (1 %) was cut" if rows == 1 else "2 rows of 100 (2 %) were cut"
    assert found.text == f"{were} (answer cut: {rows})."


def test_dropped_and_skipped_rows_and_duplicates_are_named(tmp_path: Path) -> None:
    total = FINE["total"] | {
        "dropped": {"no answer": {"rows": 1, "first": "a:1"}},
        "skipped": {
            "no JSON": {"rows": 5, "first": "a:2"},
            "not UTF-8": {"rows": 1, "first": "b:1"},
        },
    }
    texts = [each.text for each in spoken(tmp_path, data={"total": total, "duplicates": 3})]
    assert texts[1:] == [
        "1 row of 100 (1 %) was dropped (no answer: 1).",
        "6 rows of 100 (6 %) were not readable and skipped (no JSON: 5, not UTF-8: 1).",
        "3 rows duplicate an earlier one.",
    ]


def test_findings_of_the_data_check_are_named_by_their_severity(tmp_path: Path) -> None:
    findings = [
        {"finding": "mojibake", "severity": "stop", "count": 1_200},
        {"finding": "near-duplicate", "severity": "warn", "count": 3},
        {"finding": "odd", "severity": "note", "count": 9},
    ]
    found = spoken(tmp_path, data=FINE | {"findings": findings, "duplicates": 3})
    assert found[1:] == [
        Sentence("The data check found defects: near-duplicate (3).", "warn"),
        Sentence("The data check found grave defects: mojibake (1,200).", "stop"),
    ]


def test_clipping_overflows_and_patience_are_told(tmp_path: Path) -> None:
    steps = [row | {"grad_norm": 2.0, "fp16_overflows": 2} for row in losses(30)]
    changes = {"eval.patience": 2}
    found = [each.text for each in spoken(tmp_path, (1.0, 0.5, 0.505, 0.506), steps, None, changes)]
    assert found[2:] == [
        "2 steps overflowed in fp16 and were left out.",
        "In 100 % of the logged steps the gradient was clipped (optim.max_grad_norm 1).",
        "It stopped early, after 2 evaluations without a better loss (eval.patience).",
    ]


def test_steps_with_nothing_to_learn_come_from_the_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "latest").write_text("step_000030")
    outcome = {"progress": {"outcome": {"skipped": 4}}}
    write_object(run / "checkpoints" / "step_000030" / "state.json", outcome)
    texts = [each.text for each in verdict(read_run(run))]
    assert "4 steps had nothing to learn and left the weights alone." in texts


def test_a_run_that_is_under_way_says_so_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "adapter").rmdir()
    first = verdict(read_run(run))[0]
    assert first == Sentence("The run is not finished: 30 steps so far.", "warn")


@pytest.mark.parametrize(
    "after, expected, severity",
    [
        (0.5, "seed.rouge-l 0.1 (base) against 0.5 (adapter), better (p ≤ 0.001).", "good"),
        (0.02, "seed.rouge-l 0.1 (base) against 0.02 (adapter), worse (p ≤ 0.001).", "warn"),
        (0.1, "seed.rouge-l 0.1 (base) against 0.1 (adapter), no significant difference.", "note"),
    ],
)
def test_scores_after_are_compared_with_those_before(
    tmp_path: Path, after: float, expected: str, severity: str
) -> None:
    folder = make_run(tmp_path / "run", changes={"model.path": "b"})
    make_evaluation(folder / "eval_before", [0.1] * 30, "b")
    make_evaluation(folder / "eval_after", [after] * 30, "b", "runs/x/adapter")
    run = read_run(folder)
    last = verdict(run, tables(run, find(run)))[-1]
    assert last == Sentence(f"Scores on dev.jsonl: {expected}", severity)  # type: ignore[arg-type]


def test_answers_that_do_not_stop_or_are_empty_are_a_warning(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", changes={"model.path": "b"})
    for name, adapter in (("before", None), ("after", "runs/x/adapter")):
        report = {
            "model": "b", "adapter": adapter, "rows": 100, "stop_rate": 0.9, "empty_predictions": 1,
        }  # fmt: skip
        write_object(folder / name / "metrics.json", report)
    run = read_run(folder)
    found = verdict(run, tables(run, find(run)))
    # The base may do so; it is the result that must not.
    assert [each for each in found if re.search("answers? of", each.text)] == [
        Sentence("10 % of the answers of adapter do not stop by themselves.", "warn"),
        Sentence("1 answer of adapter is empty.", "warn"),
    ]


def test_the_worst_sentence_gives_the_colour() -> None:
    found = [Sentence("", "good"), Sentence("", "warn"), Sentence("", "note")]
    assert worst(found) == "warn" and worst([]) == "note"


def test_figures_are_short() -> None:
    assert [short(v) for v in (2.314, 0.1239, 12.34)] == ["2.31", "0.124", "12.3"]
    assert [percent(v) for v in (0.5, 0.02, 0.0012)] == ["50 %", "2 %", "0.12 %"]
