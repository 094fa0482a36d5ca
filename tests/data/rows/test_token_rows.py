"""Token rows: they are what encoding one conversation after the other gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwen_ds.data.batches import Part
from qwen_ds.data.read.sources import iter_conversations
from qwen_ds.data.rows.encode import encode_row
from qwen_ds.data.rows.token_rows import encode_options, prepare
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import IGNORE
from qwen_ds.model.tokenizer import load_encoding
from qwen_ds.recipe.options import DataOptions

WriteRows = Callable[[str, list[dict[str, object]]], str]


@pytest.mark.parametrize("learn_on", ["original", "answer", "official"])
def test_rows_are_what_encoding_each_conversation_gives(
    data: DataOptions, small_dir: Path, learn_on: str
) -> None:
    data = replace(data, learn_on=learn_on)  # type: ignore[arg-type]
    rows = prepare(data, load_encoding(small_dir), 64).train
    encoding, options = load_encoding(small_dir), encode_options(data, 64)
    expected = [
        (encode_row(encoding, c, options), source) for c, source in iter_conversations(data.train)
    ]
    assert len(rows) == len(expected) == 12
    for i, (row, source) in enumerate(expected):
        ids, labels = rows[i]
        assert (ids.tolist(), labels.tolist()) == (row.ids, row.labels)
        assert (ids.dtype, labels.dtype) == (np.int32, np.int32)
        assert rows.lens[i] == len(row.ids)
        assert rows.learnt[i] == sum(label != IGNORE for label in row.labels[1:])
        assert rows.source(i) == source
    assert rows.source(1) == f"{data.train[0]}:2"
    assert rows.parts == (Part(6, 1.0), Part(6, 1.0))
    assert rows.pad_id == encoding.eod_id
    for outside in (12, -1):
        with pytest.raises(IndexError):
            rows[outside]


def test_evaluation_rows_are_set_aside_by_question(
    tmp_path: Path, small_dir: Path, write_rows: WriteRows
) -> None:
    questions = [{"content": f"q{i % 100}", "summary": f"answer {i}"} for i in range(200)]
    data = DataOptions(
        [write_rows("a.jsonl", questions)], cache_dir=str(tmp_path / "c"), eval_fraction=0.2
    )
    both = prepare(data, load_encoding(small_dir), 64, seed=1)
    assert both.eval is not None
    train, aside = ({rows.source(i) for i in range(len(rows))} for rows in (both.train, both.eval))
    assert len(train) + len(aside) == 200 and not train & aside
    assert 38 <= len(aside) <= 42
    lines = {int(source.rpartition(":")[2]) for source in aside}
    assert {(line + 99) % 200 + 1 for line in lines} == lines, "lines i and i + 100 ask the same"
    assert len(both.train.lens) == len(both.train) and both.train.parts == (Part(len(train), 1.0),)
    again = prepare(data, load_encoding(small_dir), 64, seed=1)
    assert (
        again.train.sha256
        == both.train.sha256
        != prepare(data, load_encoding(small_dir), 64, seed=2).train.sha256
    )
    assert both.eval.sha256 != both.train.sha256


def test_added_rows_leave_the_split_of_the_others(
    tmp_path: Path, small_dir: Path, write_rows: WriteRows
) -> None:
    def aside(n: int) -> set[str]:
        rows = [{"content": f"类型#裙*{i}", "summary": f"好看{i}"} for i in range(n)]
        path = write_rows("a.jsonl", rows)
        found = prepare(
            DataOptions([path], cache_dir=str(tmp_path / "c"), eval_fraction=0.2),
            load_encoding(small_dir),
            64,
        ).eval
        assert found is not None
        return {found.source(i) for i in range(len(found))}

    before, after = aside(200), aside(220)
    assert len(before - after) <= 10


def test_a_split_that_leaves_nothing_is_refused(
    tmp_path: Path, small_dir: Path, write_rows: WriteRows
) -> None:
    path = write_rows("a.jsonl", [{"content": "same", "summary": str(i)} for i in range(9)])
    with pytest.raises(UserError, match=r"eval_fraction 0\.1 leaves none of the 9 rows"):
        prepare(
            DataOptions([path], cache_dir=str(tmp_path / "c"), eval_fraction=0.1),
            load_encoding(small_dir),
            64,
        )


def test_evaluation_files_are_rows_of_their_own(data: DataOptions, small_dir: Path) -> None:
    both = prepare(
        replace(data, train=data.train[:1], eval=data.train[1:], weights=[3.0]),
        load_encoding(small_dir),
        64,
    )
    assert both.eval is not None
    assert both.train.parts == (Part(6, 3.0),) and both.eval.parts == (Part(6, 1.0),)
    assert both.eval.source(0) == f"{data.train[1]}:1"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"train": []}, "data.train is empty"),
        ({"weights": [1.0]}, "data.weights has 1 numbers and data.train 2 entries"),
        ({"eval_fraction": 0.5, "eval": ["x"]}, "both given"),
    ],
)
def test_impossible_options_are_the_users_mistake(
    data: DataOptions, small_dir: Path, options: dict[str, object], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        prepare(replace(data, **options), load_encoding(small_dir), 64)  # type: ignore[arg-type]


def test_too_long_rows_are_bounded_by_the_models_length(small_dir: Path) -> None:
    assert encode_options(DataOptions(), 64).max_tokens == 64
    assert encode_options(DataOptions(max_tokens=99), 64).max_tokens == 99
