"""Recipes as tables: the keys that differ from the defaults, or between runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from qwen_ds.recipe.loading import to_dict
from qwen_ds.recipe.options import Recipe
from qwen_ds.report.folder import Row, flat


class Differing(NamedTuple):
    """A key whose values differ."""

    key: str
    values: tuple[str, ...]


# The name of a run is no setting of it.
_NO_SETTING = "output_dir"
ABSENT = "–"


def spelled(value: object) -> str:
    """A value as a recipe spells it, in one line."""
    if value is None:
        return "unset"
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(spelled, value)) or "none"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def from_defaults(recipe: Row) -> list[Differing]:
    """Keys of a recipe that are not at their defaults: value and default."""
    defaults = flat(to_dict(Recipe()))
    return [
        Differing(key, (spelled(value), spelled(defaults[key]) if key in defaults else ABSENT))
        for key, value in flat(recipe).items()
        if key != _NO_SETTING and (key not in defaults or not _equal(value, defaults[key]))
    ]


def between(tables: Sequence[Row]) -> list[Differing]:
    """Keys whose values differ between nested tables, in the order in which they come."""
    flattened = [flat(table) for table in tables]
    keys = list(dict.fromkeys(key for table in flattened for key in table if key != _NO_SETTING))
    found = []
    for key in keys:
        values = [table.get(key) for table in flattened]
        has = [key in table for table in flattened]
        if not all(has) or not all(_equal(value, values[0]) for value in values):
            pairs = zip(values, has, strict=True)
            found.append(Differing(key, tuple(spelled(v) if h else ABSENT for v, h in pairs)))
    return found


def _equal(one: Any, other: Any) -> bool:
    """Equality as YAML has it: a list is a tuple."""
    one, other = (list(v) if isinstance(v, tuple) else v for v in (one, other))
    return bool(one == other)
