"""The files of a run folder, read on no trust: whatever is missing is left out, and whatever is
broken becomes a line of the report instead of an error."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from qwen_ds.disk.read import parse_json, read_bytes, read_json, read_text
from qwen_ds.errors import UserError

Row = dict[str, Any]
Made = TypeVar("Made")

RECIPE, METRICS = "recipe.yaml", "metrics.jsonl"
MAX_LINES_BYTES = 128 * 2**20  # of one file of JSON lines
MAX_RECIPE_BYTES = 2**20
_BAD_LINES_NAMED = 3


@dataclass(frozen=True, slots=True)
class RunReader:
    """Reads the files of one folder. `troubles` grows by a line for each that is broken."""

    folder: Path
    troubles: list[str] = field(default_factory=list)

    def has(self, name: str) -> bool:
        return os.path.lexists(self.folder / name)

    def json(self, name: str) -> Row:
        """The object of a JSON file; {} if it is absent or broken."""
        return self._tried(name, lambda: read_json(self.folder / name)) or {}

    def text(self, name: str, limit: int = MAX_RECIPE_BYTES) -> str:
        return self._tried(name, lambda: read_text(self.folder / name, limit)) or ""

    def lines(self, name: str) -> list[Row]:
        """The objects of a file of JSON lines, without those that are none."""
        raw = self._tried(name, lambda: read_bytes(self.folder / name, MAX_LINES_BYTES)) or b""
        rows, bad = [], []
        for number, line in enumerate(raw.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                bad.append(number)
        if bad:
            named = ", ".join(map(str, bad[:_BAD_LINES_NAMED]))
            more = f" and {len(bad) - _BAD_LINES_NAMED:,} more" if bad[_BAD_LINES_NAMED:] else ""
            self.troubles.append(f"{name}: no JSON object in line {named}{more}; left out")
        return rows

    def recipe(self) -> Row:
        """The stored recipe, by section; {} if it is absent or broken."""
        text = self.text(RECIPE)
        try:
            # An alias can make a small file unfold to a huge one, and no stored recipe has any.
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
                raise yaml.YAMLError("it has aliases")
            found = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            self.troubles.append(f"{RECIPE}: not readable as YAML ({str(error).splitlines()[0]})")
            return {}
        if not isinstance(found, dict):
            if text.strip():
                self.troubles.append(f"{RECIPE}: no sections and keys in it; left out")
            return {}
        return found

    def guarded(self, name: str, make: Callable[[], Made], otherwise: Made) -> Made:
        """The part of the report that `make` makes of the file `name`; if its values are not those
        expected, a trouble, and `otherwise`."""
        try:
            return make()
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as bad:
            self.troubles.append(
                f"{name}: its values are not as expected ({type(bad).__name__}: {bad}); left out"
            )
            return otherwise

    def listed(self, name: str, make: Callable[[], list[Made]]) -> list[Made]:
        """`guarded` for lists: [] if the file's values are not those expected."""
        return self.guarded(name, make, [])

    def _tried(self, name: str, read: Callable[[], Made]) -> Made | None:
        if not self.has(name):
            return None
        try:
            return read()
        except UserError as error:
            self.troubles.append(str(error).removeprefix(f"{self.folder}{os.sep}"))
            return None


@dataclass(frozen=True, slots=True)
class RunFiles:
    """Everything that training leaves in a run folder; {} or [] for what is not there."""

    reader: RunReader
    steps: list[Row]  # of metrics.jsonl, those of training
    evals: list[Row]  # of metrics.jsonl, those with an evaluation loss
    recipe: Row
    deepspeed: Row
    data: Row
    environment: Row
    outcome: Row  # totals over all starts, from the newest checkpoint
    samples: list[Row]
    token_losses: list[Row]

    @property
    def folder(self) -> Path:
        return self.reader.folder

    @property
    def name(self) -> str:
        return self.folder.absolute().name

    @property
    def troubles(self) -> list[str]:
        return self.reader.troubles

    @property
    def is_finished(self) -> bool:
        """Whether the result is there."""
        return any((self.folder / name).is_dir() for name in ("adapter", "model"))


def read_run(folder: Path) -> RunFiles:
    """Read a run folder. UserError: it is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the folder of a run")
    reader = RunReader(folder)
    if not reader.has(RECIPE) and not reader.has(METRICS):
        raise UserError(f"{folder}: neither {RECIPE} nor {METRICS}; expected the folder of a run")
    metrics = reader.lines(METRICS)
    return RunFiles(
        reader,
        [row for row in metrics if "loss" in row and number(row, "step") is not None],
        [row for row in metrics if "eval_loss" in row and number(row, "step") is not None],
        reader.recipe(),
        reader.json("ds_config.json"),
        reader.json("data_report.json"),
        reader.json("environment.json"),
        _outcome(reader),
        reader.lines("samples.jsonl"),
        reader.lines("token_losses.jsonl"),
    )


def _outcome(reader: RunReader) -> Row:
    """The totals that the newest checkpoint has of the run; {} without one."""
    name = reader.text("latest", 300).strip()
    if not name or "/" in name:
        return {}
    state = reader.json(f"checkpoints/{name}/state.json")
    return reader.guarded(f"checkpoints/{name}", lambda: dict(state["progress"]["outcome"]), {})


def number(row: Row, key: str) -> float | None:
    """The finite number at a key, or None."""
    return finite(row.get(key))


def finite(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def series(rows: list[Row], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have a finite number at `key`."""
    pairs = [(row["step"], value) for row in rows if (value := number(row, key)) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def flat(value: Row, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, by dotted keys; lists stay as they are."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            found |= flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = inner
    return found
