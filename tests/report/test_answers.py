"""Answers to read: samples over time, worst rows, models side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ds.report.answers import (
    BEST,
    CHANGED,
    MAX_MOMENTS,
    MAX_PROMPTS,
    WORST,
    changed,
    count_prompts,
    question,
    ranked,
    sampled,
    sampled_last,
)
from qwen_ds.report.evaluations import Evaluation, find, verdicts
from qwen_ds.report.folder import read_run
from tests.report.runs import make_evaluation, make_run, samples


def evaluation(folder: Path, scores: list[float], by: str = "") -> Evaluation:
    make_evaluation(make_run(folder) / "eval", scores, "base", by=by)
    (found,) = find(read_run(folder))
    return found


def test_the_last_question_of_a_prompt_is_shown() -> None:
    chat = (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n一<|im_end|>\n<|im_start|>assistant\n二"
        "<|im_end|>\n<|im_start|>user\n三\n四<|im_end|>\n<|im_start|>assistant\n"
    )
    assert question(chat) == "三\n四"
    assert question("no markers") == "no markers" and question(None) == ""


def test_of_many_moments_the_first_and_the_last_stay() -> None:
    found = sampled(samples(moments=40, prompts=9))
    assert len(found) == MAX_PROMPTS and count_prompts(samples(prompts=9)) == 9
    steps = [step for step, _ in found[0].answers]
    assert len(steps) == MAX_MOMENTS and steps[0] == 10 and steps[-1] == 400
    assert steps == sorted(steps)


def test_the_worst_rows_come_first_and_the_best_last(tmp_path: Path) -> None:
    scores = [0.01 * ((i * 7) % 20) for i in range(20)]
    rows = ranked(evaluation(tmp_path / "run", scores))
    assert [row.score for row in rows[:WORST]] == sorted(scores)[:WORST]
    assert [row.score for row in rows[WORST:]] == sorted(scores)[::-1][:BEST]
    assert [row.is_best for row in rows] == [False] * WORST + [True] * BEST
    number = scores.index(min(scores))
    assert rows[0].source == f"dev.jsonl:{number + 1}"
    assert rows[0].prompt == f"问题{number}" and rows[0].prediction == f"eval的回答{number}"


def test_few_rows_are_shown_once(tmp_path: Path) -> None:
    assert len(ranked(evaluation(tmp_path / "run", [0.5, 0.1, 0.3]))) == 3


def test_rows_that_changed_most_stand_side_by_side(tmp_path: Path) -> None:
    before, after = [0.5] * 20, [0.5] * 20
    after[3], after[11] = 0.9, 0.1
    rows = changed([
        evaluation(tmp_path / "a", before), evaluation(tmp_path / "b", after, by="b")
    ])  # fmt: skip
    assert rows is not None and len(rows) == 2 * CHANGED and rows[0].source == "dev.jsonl:4"
    assert rows[CHANGED].source == "dev.jsonl:12"
    assert [score for _, score in rows[0].answers] == [0.5, 0.9]


def test_rows_that_all_answer_alike_have_not_changed(tmp_path: Path) -> None:
    same = [evaluation(tmp_path / name, [0.5] * 6) for name in ("a", "b")]
    assert changed(same) == []
    same[1].predictions[2]["prediction"] = "另一个回答"
    assert [row.source for row in changed(same) or []] == ["dev.jsonl:3"]
    same[1].predictions.clear()
    assert changed(same) is None


def test_rows_of_a_list_on_one_line_keep_their_own_texts(tmp_path: Path) -> None:
    found = []
    for name, scores in (("a", [0.5] * 12), ("b", [0.5] * 9 + [0.9] * 3)):
        made = evaluation(tmp_path / name, scores, by=name)
        for row in [*made.rows, *made.predictions]:
            row["source"] = "list.json:1"
        found.append(made)
    worst = ranked(found[0])
    assert [row.prompt for row in worst[:2]] == ["问题0", "问题1"]
    assert worst[1].reference == "参考答案1" and worst[1].prediction == "evala的回答1"
    top = (changed(found) or [])[0]
    assert (top.source, top.prompt, top.reference) == ("list.json:1", "问题11", "参考答案11")
    assert [score for _, score in top.answers] == [0.5, 0.9]
    assert verdicts(*found)["seed.rouge-l"].difference == pytest.approx(0.1)


def test_without_an_evaluation_the_last_samples_stand_side_by_side() -> None:
    rows = sampled_last([samples(moments=3), samples(moments=5, prompts=1)])
    assert [row.prompt for row in rows] == ["第1个问题：什么是春天？"]
    assert [text for text, _ in rows[0].answers] == ["春天是第3次回答", "春天是第5次回答"]
