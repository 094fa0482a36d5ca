"""Rows inside one JSON value: the containers that APIs, pandas and annotation tools write.

{"version": "1.0", "data": [row, ..]}          a list under a name that is known
{"a": [row, ..], "b": [row, ..]}               lists of rows alone
{"0": row, "1": row}                           pandas' orient="index"
{"columns": [..], "index": [..], "data": [[..], ..]}                       "split"
{"instruction": {"0": .., "1": ..}, "output": {"0": .., "1": ..}}          "columns"
{"instruction": [.., ..], "output": [.., ..]}                              "list"
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

_LISTS = "data rows train examples instances items records samples list results".split()
IsRow = Callable[[object], bool]
Inner = tuple[object, str]
"""A row, and its place in the container: "data[3]"."""


def rows_inside(value: object, is_row: IsRow) -> Iterator[Inner] | None:
    """The rows of a container, None if the value is a row itself, or no container that is known.

    `is_row` tells whether a value has the keys of a row.
    """
    if not isinstance(value, dict):
        return None
    # Before anything that costs: almost every value is a row.
    if not any(isinstance(inner, list | dict) for inner in value.values()):
        return None
    return _by_column(value, is_row) or (None if is_row(value) else _by_row(value, is_row))


def _by_column(table: dict[str, Any], is_row: IsRow) -> Iterator[Inner] | None:
    """Columns of equal shape. A row, too, may have lists for values, but not in every column."""
    columns = list(table.values())
    first = columns[0]
    if len(columns) < 2 or not first:
        return None
    places: list[Any]
    if isinstance(first, dict) and all(key.isdecimal() for key in first):
        places = list(first)
        if not all(isinstance(c, dict) and c.keys() == first.keys() for c in columns):
            return None
    elif isinstance(first, list):
        places = list(range(len(first)))
        if not all(isinstance(c, list) and len(c) == len(first) for c in columns):
            return None
    else:
        return None
    if not all(isinstance(c[at], str | int | float | None) for c in columns for at in places):
        return None
    if not is_row({key: column[places[0]] for key, column in table.items()}):
        return None
    return (({key: column[at] for key, column in table.items()}, f"[{at}]") for at in places)


def _by_row(value: dict[str, Any], is_row: IsRow) -> Iterator[Inner] | None:
    names, data = value.get("columns"), value.get("data")
    if isinstance(names, list) and isinstance(data, list) and all(_fits(x, names) for x in data):
        rows = (
            (dict(zip(names, cells, strict=True)), f"data[{i}]") for i, cells in enumerate(data)
        )
        return rows if data else None
    if all(isinstance(rows, list) for rows in value.values()):
        lists = list(value)
    else:
        lists = [key for key in value if key.lower() in _LISTS and isinstance(value[key], list)]
    first = next((row for key in lists for row in value[key]), None)
    if _is_numbered(first):  # the hub's API: {"row_idx": 0, "row": {..}}
        return (
            (row.get("row") if _is_numbered(row) else row, f"{key}[{at}]")
            for key in lists
            for at, row in enumerate(value[key])
        )
    if first is not None and is_row(first):
        return ((row, f"{key}[{at}]") for key in lists for at, row in enumerate(value[key]))
    if all(isinstance(row, dict) for row in value.values()) and is_row(next(iter(value.values()))):
        return ((row, f"[{key}]") for key, row in value.items())
    return None


def _fits(cells: object, names: list[Any]) -> bool:
    return isinstance(cells, list) and len(cells) == len(names)


def _is_numbered(row: object) -> bool:
    return isinstance(row, dict) and "row_idx" in row and isinstance(row.get("row"), dict)
