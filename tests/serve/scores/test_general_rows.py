"""General rows: texts, and questions spelled as Qwen's own evaluation spells them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_ds.errors import UserError
from serve.scores.general_rows import read_general
from serve.scores.likelihood import Choices, PlainText

MONTHS = {"question": "一年有几个月？", "A": "十", "B": "十二", "answer": "B"}


def written(path: Path, *rows: object) -> str:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_texts_and_questions_may_share_a_file(tmp_path: Path) -> None:
    file = written(tmp_path / "g.jsonl", {"text": "山高水长。"}, MONTHS)
    text, question = read_general([file])
    assert (text.id, text.source, text.item) == (0, f"{file}:1", PlainText("山高水长。"))
    assert question.item == Choices("问题：一年有几个月？\nA. 十\nB. 十二\n答案：", ("A", "B"))
    assert (question.id, question.source, question.answer) == (1, f"{file}:2", 1)


def test_c_evals_csv_files_give_each_question_the_examples_of_its_subject(tmp_path: Path) -> None:
    head = "id,question,A,B,C,D,answer,explanation\n"
    (tmp_path / "law_val.csv").write_text(head + "0,问,甲,乙,丙,丁,D,\n", encoding="utf-8")
    rows = "".join(f"{i},例{i},甲,乙,丙,丁,A,因为\n" for i in range(7))
    (tmp_path / "law_dev.csv").write_text(head + rows, encoding="utf-8")
    (tmp_path / "logic_dev.csv").write_text(head + "0,别的,甲,乙,丙,丁,B,\n", encoding="utf-8")
    examples = [str(tmp_path / f"{name}_dev.csv") for name in ("logic", "law")]
    (row,) = read_general([str(tmp_path / "law_val.csv")], examples)
    assert isinstance(row.item, Choices)
    shown = [part.split("\n")[0] for part in row.item.prompt.split("问题：")[1:]]
    assert shown == ["例0", "例1", "例2", "例3", "例4", "问"]
    assert "答案：A\n\n" in row.item.prompt and row.item.prompt.endswith("\nD. 丁\n答案：")
    assert row.item.letters == ("A", "B", "C", "D") and row.answer == 3


def test_examples_of_other_subjects_serve_where_there_are_none_and_never_the_question_itself(
    tmp_path: Path,
) -> None:
    other = MONTHS | {"question": "一周有几天？", "A": "七", "B": "八", "answer": "A"}
    file = written(tmp_path / "g.jsonl", MONTHS)
    (row,) = read_general([file], [written(tmp_path / "e.jsonl", MONTHS, other)])
    assert isinstance(row.item, Choices)
    assert row.item.prompt.count("一年有几个月？") == 1 and "一周有几天？" in row.item.prompt


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a"}, "found prompt; expected text, or question, A, B, .. and answer"),
        ({"text": "  "}, "text is empty or no text"),
        ({"text": 5}, "text is empty or no text"),
        (MONTHS | {"answer": ""}, "answer is empty; expected one of A, B .*take val"),
        (MONTHS | {"answer": "C"}, "answer is C; expected one of A, B"),
        (MONTHS | {"B": ""}, "1 choices; expected at least A and B"),
        (MONTHS | {"question": " "}, "question is empty"),
        (["a"], "found list; expected text"),
    ],
)
def test_a_row_that_cannot_be_measured_is_named(tmp_path: Path, row: Any, said: str) -> None:
    file = written(tmp_path / "g.jsonl", {"text": "好"}, row)
    with pytest.raises(UserError, match=f"g.jsonl:2: {said}"):
        read_general([file])


def test_examples_without_questions_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "g.jsonl", {"text": "好"})
    with pytest.raises(UserError, match="no questions; expected examples with answers"):
        read_general([file], [file])
