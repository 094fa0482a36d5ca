"""Which reader each file of a data set gets, as data_report.json tells it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_ds.data.read.places import locate
from qwen_ds.data.rows.reading import formats_of
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


def test_a_format_or_columns_of_the_recipe_are_told_as_they_are(folder: Path) -> None:
    assert formats_of(DataOptions(format="alpaca"), locate(folder)) == {str(folder): "alpaca"}
    columns = DataOptions(columns={"content": "q", "summary": "a"})
    assert formats_of(columns, locate(folder)) == {str(folder): "columns content, summary"}
