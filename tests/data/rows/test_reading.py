"""Which reader each file of a data set gets, as data_report.json tells it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_ds.data.read.places import locate
from qwen_ds.data.read.sources import iter_conversations
from qwen_ds.data.rows.data_report import PartReport
from qwen_ds.data.rows.reading import formats_of, read_options
from qwen_ds.recipe.options import DataOptions

ADGEN, ALPACA = {"content": "a", "summary": "b"}, {"instruction": "a", "output": "b"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text(json.dumps(ADGEN))
    (tmp_path / "b.json").write_text(json.dumps({"data": [ALPACA]}))
    return tmp_path


def test_each_file_is_told_by_its_first_row_inside_a_container_too(folder: Path) -> None:
    found = formats_of(DataOptions(), locate(folder))
    assert found == {str(folder / "a.jsonl"): "adgen", str(folder / "b.json"): "alpaca"}


def test_the_report_keeps_encodings_and_what_is_left_out(tmp_path: Path) -> None:
    rows = [{**ADGEN, "content": "請翻譯成英文"}]
    (tmp_path / "a.json").write_bytes(json.dumps(rows, ensure_ascii=False).encode("big5"))
    (tmp_path / "b.json").write_text(json.dumps({"train": [ADGEN], "test": [ALPACA]}))
    report = PartReport(str(tmp_path))
    options = read_options(DataOptions(encoding="auto"), report)
    big5 = read_options(DataOptions(encoding="big5"), report)
    assert len(list(iter_conversations([tmp_path / "b.json"], options))) == 1
    assert len(list(iter_conversations([tmp_path / "a.json"], big5))) == 1
    kept = report.to_dict()
    assert kept["encodings"] == {str(tmp_path / "a.json"): "big5"}
    left = {f"{tmp_path / 'b.json'}:1 test": "of the split test (1 rows)"}
    assert kept["left_out"] == left


def test_a_format_or_columns_of_the_recipe_are_told_as_they_are(folder: Path) -> None:
    assert formats_of(DataOptions(format="alpaca"), locate(folder)) == {str(folder): "alpaca"}
    columns = DataOptions(columns={"content": "q", "summary": "a"})
    assert formats_of(columns, locate(folder)) == {str(folder): "columns content, summary"}
