"""Columns of files: those that are empty or the same in every row, found as the rows pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from qwen_ds.data.read.dialogue import EMPTY, RowError, is_blank, is_said
from qwen_ds.data.read.readers import Reader, find_reader

LEAST_ROWS = 3  # fewer say nothing about a column
# Columns that are often empty, or the same, and meant so.
_USUAL = {"system", "input", "history", "context", "tools", "tags", "name"}
_SAME = {"system", "tools"}


@dataclass(slots=True)
class FileColumns:
    """One path's columns. `values` has those that have been the same in every row so far."""

    path: str
    rows: int = 0
    values: dict[str, object] = field(default_factory=dict)
    first: int = 0  # its first record
    reader: Reader | None = None
    keys: frozenset[str] = frozenset()  # of the first row

    def see(self, row: object, record: int) -> None:
        """Take a source row into account."""
        self.rows += 1
        if not isinstance(row, dict):
            self.values.clear()
            return
        if self.rows == 1:
            self.first, self.values, self.keys = record, dict(row), frozenset(row)
            try:
                self.reader = find_reader(row)
            except RowError:
                self.reader = None
            return
        for key in [key for key, value in self.values.items() if not _same(row.get(key), value)]:
            del self.values[key]

    def faults(self) -> Iterator[tuple[str, str]]:
        """(kind, column) of each column of the texts that is empty or constant."""
        if self.rows < LEAST_ROWS:
            return
        read = None if self.reader is None else {*self.reader.mappable}
        for column, value in self.values.items():
            if read is not None and column not in read:
                continue
            if value in EMPTY or (isinstance(value, str) and is_blank(value)):
                if column not in _USUAL:
                    yield "empty-column", column
            elif column not in _SAME and is_said(value) and not self._asks(column):
                yield "constant-column", column

    def _asks(self, column: str) -> bool:
        """Whether a constant column holds the task, and another one what it is about."""
        if self.reader is None or column not in self.reader.keys:
            return False
        answers = (*self.reader.answers, *self.reader.also)
        others = {*self.reader.mappable} - {*answers, "system", column}
        return any(other not in self.values for other in others & self.keys)


def _same(value: object, other: object) -> bool:
    return (value in EMPTY and other in EMPTY) or value == other
