"""Containers: which JSON values hold rows, and which are rows themselves."""

from __future__ import annotations

import pytest

from qwen_ds.data.read.containers import rows_inside
from qwen_ds.errors import UserError

ROWS = [{"q": "1", "a": "2"}, {"q": "3", "a": "4"}]


def is_row(value: object) -> bool:
    return isinstance(value, dict) and {"q", "a"} <= value.keys()


@pytest.mark.parametrize(
    ("value", "places"),
    [
        ({"version": "1", "data": ROWS}, ["data[0]", "data[1]"]),
        ({"x": ROWS[:1], "y": [], "z": ROWS[1:]}, ["x[0]", "z[0]"]),
        ({"7": ROWS[0], "8": ROWS[1]}, ["[7]", "[8]"]),
        ({"columns": ["q", "a"], "data": [["1", "2"], ["3", "4"]]}, ["data[0]", "data[1]"]),
        ({"q": {"0": "1", "1": "3"}, "a": {"0": "2", "1": "4"}}, ["[0]", "[1]"]),
        ({"q": ["1", "3"], "a": ["2", "4"]}, ["[0]", "[1]"]),
        ({"rows": [{"row_idx": 0, "row": row} for row in ROWS]}, ["rows[0]", "rows[1]"]),
    ],
    ids=["data", "lists", "index", "split", "columns", "list", "hub"],
)  # fmt: skip
def test_the_rows_of_a_container_come_in_order(value: object, places: list[str]) -> None:
    inside = rows_inside(value, is_row)
    assert inside is not None and not inside.left_out
    assert list(inside.rows) == list(zip(ROWS, places, strict=True))


SPLITS = {"Train": ROWS[:1], "dev": ROWS[1:], "version": "1"}


@pytest.mark.parametrize(
    ("value", "split", "places", "left"),
    [
        (SPLITS, None, ["Train[0]"], {"dev": "of the split validation (1 rows)"}),
        (SPLITS, "validation", ["dev[0]"], {"Train": "of the split train (1 rows)"}),
        (SPLITS, "dev", ["dev[0]"], {"Train": "of the split train (1 rows)"}),
        ({"test": ROWS, "about": ""}, None, ["test[0]", "test[1]"], {}),
        ({"extra": ROWS[:1], "my_test": ROWS[1:]}, None, ["extra[0]"],
         {"my_test": "of the split test (1 rows)"}),
        ({"data": ROWS}, "test", ["data[0]", "data[1]"], {}),
    ],
)  # fmt: skip
def test_keys_are_splits_as_the_names_of_files_are(
    value: object, split: str | None, places: list[str], left: dict[str, str]
) -> None:
    inside = rows_inside(value, is_row, split)
    assert inside is not None and inside.left_out == left
    assert [place for _, place in inside.rows] == places
    assert bool(inside.splits) == ("data" not in places[0])


def test_a_split_that_no_key_names_is_an_error() -> None:
    with pytest.raises(UserError, match="a.json: no split 'test' in it; splits found: train, val"):
        rows_inside(SPLITS, is_row, "test", "a.json")


def test_a_row_with_a_list_called_test_is_a_row() -> None:
    assert rows_inside({**ROWS[0], "test": ROWS}, is_row) is None


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        "text",
        ROWS[0],
        {"q": {"round_0": "x"}, "a": {"round_0": "y"}},
        {"q": ["1"], "a": ["2", "3"]},
        {"q": [["1"]], "a": [["2"]]},
        {"turns": ROWS, "id": 3},
        {"data": [1, 2]},
        {"columns": ["q"], "data": []},
    ],
    ids=str,
)
def test_a_row_or_an_unknown_value_is_left_alone(value: object) -> None:
    assert rows_inside(value, is_row) is None
