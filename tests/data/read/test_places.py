"""Places: splits by whole words, and limits that travel with a folder's files."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qwen_ds.data.read.file_names import split_of
from qwen_ds.data.read.files import read_rows
from qwen_ds.data.read.files_encoding import encoding_of
from qwen_ds.data.read.limits import Budget, Budgeted, FileOptions, LimitReached, Rewound
from qwen_ds.data.read.places import locate, rows_of
from qwen_ds.errors import UserError


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("data-train-00000-of-00002.parquet", "train"),
        ("train-00000-of-00001-a09b74b3ef9c3b56.parquet", "train"),
        ("validation/x.json", "validation"),
        ("xx_dev.json", "validation"),
        ("zh.val.json.gz", "validation"),
        ("json-test.arrow", "test"),
        ("test/part-0.json", "test"),
        ("test_set.csv", "test"),
        ("dialog_dev_team.jsonl", None),
        ("contest.jsonl", None),
        ("trainer.jsonl", None),
        ("latest.json", None),
        ("my_dev_notes/a.json", None),
        ("数据.jsonl", None),
    ],
)
def test_a_split_is_the_first_or_last_word_of_a_name(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    for name in ("train.jsonl", "dev.jsonl", "notes.txt"):
        (tmp_path / name).write_text('{"q": 1}\n')
    told: dict[str, str] = {}
    rows = list(rows_of(locate(tmp_path), FileOptions(on_left_out=told.__setitem__)))
    assert len(rows) == 1
    assert {Path(name).name: why for name, why in told.items()} == {
        "dev.jsonl": "of the split validation",
        "notes.txt": "no suffix of data",
    }


def test_an_encoding_other_than_utf8_is_told(tmp_path: Path) -> None:
    row = {"q": "这是一个完整的问题。", "a": "这是一个完整的回答。"}
    told: dict[str, str] = {}
    for name, encoding in (("a.jsonl", "utf-8"), ("b.jsonl", "gb18030"), ("c.jsonl", "utf-16")):
        (tmp_path / name).write_text(json.dumps(row, ensure_ascii=False), encoding=encoding)
        (found,) = read_rows(tmp_path / name, FileOptions(on_encoding=told.__setitem__))
        assert found.row == row  # type: ignore[union-attr]
    assert [*told.values()] == ["gb18030", "utf-16"]


@pytest.mark.parametrize("encoding", ["big5hkscs", "cp949", "cp932", "euc_jp"])
def test_east_asian_text_is_not_taken_for_gb18030(encoding: str) -> None:
    text = {
        "big5hkscs": "今天天氣很好，我們去公園走走，然後回家吃飯。",
        "cp949": "오늘은 날씨가 매우 좋아서 공원에 산책하러 갑니다.",
    }.get(encoding, "今日はとても天気がいいので、公園へ散歩に行きます。")
    head = text.encode(encoding)
    assert head.decode(encoding_of(head, "f", is_whole=True)) == text


@pytest.mark.parametrize("row", [("翻译hello", "你好"), ("你好", "好")])
def test_a_short_row_of_gbk_is_not_in_doubt(row: tuple[str, str]) -> None:
    text = json.dumps({"instruction": row[0], "output": row[1]}, ensure_ascii=False)
    assert encoding_of(text.encode("gbk"), "f", is_whole=True) == "gb18030"


def test_a_row_of_a_table_has_the_limit_of_any_row(tmp_path: Path) -> None:
    path, text = tmp_path / "a.parquet", "x" * 2_000_000
    pyarrow.parquet.write_table(pyarrow.table({"q": [text] * 3}), path)
    assert [row.source for row in read_rows(path)] == [f"{path}#{at}" for at in range(3)]
    with pytest.raises(UserError, match=r"#0: a row of more than 1 MB.*data.max_row_mb"):
        list(read_rows(path, FileOptions(max_row_mb=1)))


def test_a_budget_is_one_for_all_members() -> None:
    budget = Budget("f", 10, FileOptions(max_expansion=2))
    budget.left = 15
    streams = [Budgeted(Rewound(b"x" * 10, Rewound(b"", None)), budget) for _ in "12"]  # type: ignore[arg-type]
    assert streams[0].read(10) == b"x" * 10
    with pytest.raises(LimitReached, match="f: unfolds to more than .* data.max_expansion"):
        streams[1].read(10)
