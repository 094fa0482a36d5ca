"""Rows inside one JSON value: the containers that APIs, pandas and annotation tools write.

{"version": "1.0", "data": [row, ..]}          a list under a name that is known
{"a": [row, ..], "b": [row, ..]}               lists of rows alone
{"train": [row, ..], "test": [row, ..]}        splits, of which one is read
{"0": row, "1": row}                           pandas' orient="index"
{"columns": [..], "index": [..], "data": [[..], ..]}                       "split"
{"instruction": {"0": .., "1": ..}, "output": {"0": .., "1": ..}}          "columns"
{"instruction": [.., ..], "output": [.., ..]}                              "list"
[turn, turn]                                   a conversation, without a key for its turns
[[turn, turn], [turn, turn]]                   several
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qwen_ds.data.read.file_names import SPLITS, names_of_split, splits_among

_LISTS = {*"data rows examples instances items records samples list results".split(), *SPLITS}
_TURNS = {"messages": {"role", "content"}, "conversations": {"from", "value"}}
IsRow = Callable[[object], bool]


@dataclass(frozen=True, slots=True)
class Inside:
    """The rows of a container, each with its place: "data[3]"."""

    rows: Iterator[tuple[object, str]]
    left_out: dict[str, str] = field(default_factory=dict)
    """Keys of rows that are not read, with the reason."""
    splits: list[str] = field(default_factory=list)
    """Those that the container's keys name."""


def rows_inside(
    value: object, is_row: IsRow, split: str | None = None, path: str = ""
) -> Inside | None:
    """The rows of a container, None if the value is a row itself, or no container that is known.

    Args:
        is_row: tells whether a value has the keys of a row.
        split: the one to read where the keys name splits, as the names of a folder's files do.
            UserError, which names the path, if they name others only.
    """
    if isinstance(value, list):
        return _by_turns(value)
    if not isinstance(value, dict):
        return None
    # Before anything that costs: almost every value is a row.
    of_rows = sum([isinstance(inner, (list, dict)) for inner in value.values()])
    if not of_rows:
        return None
    if of_rows == len(value) and (columns := _by_column(value, is_row)):
        return columns
    return None if is_row(value) else _by_row(value, is_row, split, path)


def key_of_turns(value: object) -> str | None:
    """The key under which a list of turns would be a row, None if the value is no such list."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        for key, kind in _TURNS.items():
            if all(turn.keys() >= kind for turn in value):
                return key
    return None


def _by_turns(value: list[Any]) -> Inside | None:
    if key := key_of_turns(value):
        return Inside(iter([({key: value}, "")]))
    if value and (key := key_of_turns(value[0])):
        return Inside(({key: turns}, f"[{at}]") for at, turns in enumerate(value))
    return None


def _by_column(table: dict[str, Any], is_row: IsRow) -> Inside | None:
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
    return Inside(({k: column[at] for k, column in table.items()}, f"[{at}]") for at in places)


def _by_row(value: dict[str, Any], is_row: IsRow, split: str | None, path: str) -> Inside | None:
    names, data = value.get("columns"), value.get("data")
    if isinstance(names, list) and isinstance(data, list) and all(_fits(x, names) for x in data):
        rows = (
            (dict(zip(names, cells, strict=True)), f"data[{i}]") for i, cells in enumerate(data)
        )
        return Inside(rows) if data else None
    if all(isinstance(rows, list) for rows in value.values()):
        lists = list(value)
    else:
        lists = [key for key in value if key.lower() in _LISTS and isinstance(value[key], list)]
    first = next((row for key in lists for row in value[key]), None)
    if first is not None and (_is_numbered(first) or is_row(first)):
        splits = splits_among(lists)
        lists, left = names_of_split(lists, split if splits else None, path)
        left = {key: f"{reason} ({len(value[key]):,} rows)" for key, reason in left.items()}
        return Inside(_listed(value, lists), left, splits)
    if all(isinstance(row, dict) for row in value.values()) and is_row(next(iter(value.values()))):
        return Inside((row, f"[{key}]") for key, row in value.items())
    return None


def _listed(value: dict[str, Any], lists: list[str]) -> Iterator[tuple[object, str]]:
    """The rows of lists; the hub's API wraps each: {"row_idx": 0, "row": {..}}."""
    for key in lists:
        for at, row in enumerate(value[key]):
            yield row["row"] if _is_numbered(row) else row, f"{key}[{at}]"


def _fits(cells: object, names: list[Any]) -> bool:
    return isinstance(cells, list) and len(cells) == len(names)


def _is_numbered(row: object) -> bool:
    return isinstance(row, dict) and "row_idx" in row and isinstance(row.get("row"), dict)
