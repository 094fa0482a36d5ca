"""Several references of a row: in the answer's own column, in others, in files of predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_ds.errors import UserError
from serve.files.prediction import predict
from serve.files.references import references_of
from serve.options import PredictOptions, parse
from tests.serve.files.test_prediction import read_lines, write_rows


def test_own_answer_first_then_the_columns_none_twice_and_none_blank() -> None:
    row = {"a": ["two", " ", "one"], "b": "three", "c": None}
    assert references_of("one", [row], ["a", "b", "c", "d"], "f:1") == ("one", "two", "three")
    assert references_of(None, [row], ["b"], "f:1") == ("three",)
    assert references_of("one", [], ["a"], "f:1") == ("one",)
    with pytest.raises(UserError, match="f:1: a holds no texts; expected a text, or a list"):
        references_of(None, [{"a": ["x", 5]}], ["a"], "f:1")


def lines_of(small_dir: Path, rows: list[dict[str, Any]], folder: Path, *more: str) -> list[Any]:
    data = write_rows(folder / "rows.jsonl", rows)
    words = ["--model", str(small_dir), "--input", str(data), "--output", str(folder / "out")]
    options = parse(PredictOptions, "", [*words, "--max_new_tokens", "2", *more])
    predict(options.model, options.input, folder / "out", options)
    return read_lines(folder / "out")


def test_an_answer_may_be_a_list_and_columns_may_hold_more(small_dir: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"content": "q", "summary": ["", "first", "second"], "more": "third"},
        {"content": "q", "summary": "only"},
    ]
    lines = lines_of(small_dir, rows, tmp_path, "--references", "summary", "more")
    assert [line["reference"] for line in lines] == ["first", "only"]
    assert [line.get("references") for line in lines] == [["first", "second", "third"], None]


def test_a_list_is_no_answer_unless_its_column_is_named(small_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:1: summary is a list; expected text"):
        lines_of(small_dir, [{"content": "q", "summary": ["a", "b"]}], tmp_path)


def test_a_column_that_no_row_has_is_named(small_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--references mroe: no row has it"):
        lines_of(small_dir, [{"content": "q", "more": "a"}], tmp_path, "--references", "mroe")
    assert json.loads((tmp_path / "rows.jsonl").read_text())["more"] == "a"
