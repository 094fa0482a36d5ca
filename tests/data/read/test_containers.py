"""Containers: which JSON values hold rows, and which are rows themselves."""

from __future__ import annotations

import pytest

from qwen_ds.data.read.containers import rows_inside

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
    assert list(rows_inside(value, is_row) or ()) == list(zip(ROWS, places, strict=True))


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
