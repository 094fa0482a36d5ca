"""Conversations from the paths of a recipe: files, folders and hub data sets.

A path is a data file of any kind that files.py reads; a folder, whose data files are read in the
order of their names; a folder that `datasets` saved; or the id of a data set on the hub,
"org/name", "org/name:split" or "org/name:config:split". "path:split" names one of several splits
of a folder, an archive, a workbook or a JSON object; without a name it is "train" (file_names.py).

`columns` maps the keys that a reader expects to the columns of the data, {"instruction": "q",
"output": "a"}. Then only the columns named in it are read, by the reader whose keys are named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen_ds.data.read.containers import rows_inside
from qwen_ds.data.read.dialogue import (
    EMPTY,
    Dialogue,
    Dropped,
    Outcome,
    Result,
    Row,
    RowError,
    as_conversation,
    as_prompt,
    names,
    object_of,
    turns_left_out,
)
from qwen_ds.data.read.files_json import BadRow, SourceRow
from qwen_ds.data.read.limits import DEFAULT, FileOptions
from qwen_ds.data.read.places import Place, locate, rows_of
from qwen_ds.data.read.readers import (
    TABLE,
    Reader,
    find_reader,
    fitting,
    nearest,
    nested_answer,
    reader_named,
    with_first_texts,
)
from qwen_ds.data.read.readers_tree import MessageTrees
from qwen_ds.errors import UserError

NotRead = dict[str, Counter[str]]
"""By path, how many rows hold something under a key that is not read, or in turns left out."""


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How rows are read, as a recipe's data.* and the options of serving say it."""

    format: str = "auto"  # a reader's name, or auto: each row finds its own
    columns: Mapping[str, str] | None = None  # see the top of this file
    system: str | None = None  # system text of rows that have none
    bad_rows: Literal["stop", "skip"] = "stop"  # what becomes of a row that cannot be read
    files: FileOptions = DEFAULT


def iter_conversations(
    paths: Sequence[str | Path],
    options: ReadOptions = ReadOptions(),
    counts: Counter[str] | None = None,
    not_read: NotRead | None = None,
    seen: list[object] | None = None,
) -> Iterator[tuple[Result, str]]:
    """The conversations of all paths in order, or a Dropped for a row without one, and its source.

    A row may give several conversations (a tree), several rows one (single messages). Where
    bad_rows is "skip", a row that cannot be read (broken JSON, wrong types, an unknown role,
    unknown keys) comes as a Dropped with `unreadable` set. Options and paths are checked at once,
    not when the first row is asked for. "rows" of `counts` counts the source rows as they are read.
    Where bad_rows is "stop", such a row is a UserError: "source: what came; what was expected".
    `not_read` counts, by path and key, the rows whose key holds something that is not read.
    `seen` is given the row that the latest conversation came from, as its only element: none, if
    it came from several, or the row could not be read.
    """
    reading = _Reading(options, False, Counter() if counts is None else counts, not_read)
    reading.seen = [] if seen is None else seen
    results = reading.results([locate(path) for path in paths])
    return ((result, source) for result, _, source in results)


def iter_prompts(
    paths: Sequence[str | Path],
    options: ReadOptions = ReadOptions(),
    not_read: NotRead | None = None,
    seen: list[object] | None = None,
    references: Sequence[str] = (),
) -> Iterator[tuple[Result, str | None, str]]:
    """Prompts to answer: (the conversation up to its last user turn, the row's own answer, source).

    As iter_conversations, but a row needs no answer: {"content": ..} alone, an instruction alone,
    messages that end with the user, {"prompt": ..}, {"question": ..}, {"query": ..}, {"input": ..}
    or {"text": ..}. The answer is that of the last turn, None where it is missing. A row without a
    question comes as (Dropped, None, source), so that no row is lost. `seen` is given the row that
    the latest prompt came from, as its only element: none, if it came from several. Columns named
    in `references` may hold a list of texts; a reader whose answer such a column is takes the first
    that says something.
    """
    reading = _Reading(options, True, Counter(), not_read)
    reading.seen = [] if seen is None else seen
    reading.references = references
    return reading.results([locate(path) for path in paths])


class _Reading:
    """ReadOptions, checked, and what they make of a row."""

    def __init__(
        self,
        options: ReadOptions,
        for_prompts: bool,
        counts: Counter[str],
        not_read: NotRead | None,
    ) -> None:
        self.options, self.for_prompts, self.counts = options, for_prompts, counts
        self.not_read = {} if not_read is None else not_read
        self.seen: list[object] = []
        self.references: Sequence[str] = ()
        self.columns = options.columns or {}
        self.reader = None if options.format == "auto" else reader_named(options.format)
        if self.columns:
            self.reader = self._reader_of_columns()

    def _reader_of_columns(self) -> Reader:
        readers = [self.reader] if self.reader else list(TABLE)
        known = {key for each in readers for key in each.mappable}
        unknown = [key for key in self.columns if key not in known]
        if unknown:
            raise UserError(
                f"data.columns has the key {unknown[0]!r}; expected keys of a format: "
                f"{names(sorted(known), 40)}"
            )
        keys = set(self.columns)
        for each in readers:
            if each.fits(keys, self.for_prompts) and keys.issubset(each.mappable):
                return each
        expected = self.reader.expected if self.reader else nearest(tuple(self.columns))
        raise UserError(
            f"data.columns names {names(self.columns)}; expected all keys of a format: {expected}"
        )

    def results(self, places: Sequence[Place]) -> Iterator[tuple[Result, str | None, str]]:
        """(result, the row's own answer if it is not part of that, source) of all places."""
        for place in places:
            for outcome, source, row in self._outcomes(place):
                result: Result
                reference = None
                if isinstance(outcome, Dropped):
                    result = outcome
                elif self.for_prompts:
                    result, reference = as_prompt(outcome, self.options.system)
                else:
                    result = as_conversation(outcome, self.options.system)
                if isinstance(result, Dropped):
                    result = result if result.detail else self._explained(result, row)
                elif isinstance(outcome, Dialogue):
                    used = len(result.turns) + (reference is not None)
                    if left_out := turns_left_out(outcome, used):
                        self.not_read[place.path][left_out] += 1
                yield result, reference, source

    def _outcomes(self, place: Place) -> Iterator[tuple[Outcome, str, object]]:
        """Every outcome of a path, with its source and, if one row gave it, that row."""
        trees = MessageTrees()
        is_first = True
        not_read = self.not_read.setdefault(place.path, Counter())
        for row in rows_of(place, self.options.files):
            if isinstance(row, BadRow):
                self.counts["rows"] += 1
                self.seen.clear()
                error = RowError(row.reason, row.detail)
                yield self._unreadable(error, row.source), row.source, None
                continue
            for value, source in self._unwrapped(row, place):
                self.counts["rows"] += 1
                self.seen[:] = [value]
                value = with_first_texts(value, self.references)
                try:
                    left_out: list[str] = []
                    if self.columns:
                        value, left_out = self._mapped(value, source, is_first)
                        is_first = False
                    reader, found = self._recognised(value)
                    beside = reader.beside(found)
                    if reader.of_row is None:
                        trees.add(found, source)
                        not_read.update(reader.not_read(found, beside))
                        continue
                    outcomes = reader.read(found, self.for_prompts, beside)
                    if unread := reader.not_read(found, beside, outcomes):
                        left_out += unread
                    for key in left_out:
                        not_read[key] += 1
                except RowError as error:
                    yield self._unreadable(error, source), source, value
                    continue
                for outcome in outcomes:
                    yield outcome, source, value
        self.seen.clear()
        for outcome, source in trees.outcomes():
            yield outcome, source, None

    def _explained(self, result: Dropped, row: object) -> Dropped:
        """The result with a detail that names the row's keys and those of its format."""
        if not isinstance(row, dict):
            return result
        reader = self.reader or find_reader(row, self.for_prompts)
        if len(reader.keys) == 1 and not reader.answers and row.get(reader.keys[0]) is not None:
            if nested := nested_answer(row):
                return Dropped(result.reason, nested)
            if reader.parts is None:
                return Dropped(result.reason, f"{reader.keys[0]} holds {result.reason}")
        expected = reader.expected
        return Dropped(result.reason, f"keys found: {names(row)}; keys expected: {expected}")

    def _recognised(self, value: object) -> tuple[Reader, Row]:
        row = object_of(value, "the row")
        if self.reader is None:
            return find_reader(row, self.for_prompts), row
        if not self.reader.fits(row, self.for_prompts):
            expected = f"{self.reader.expected} (format {self.reader.name})"
            raise RowError("missing key", f"keys found: {names(row)}; keys expected: {expected}")
        return self.reader, row

    def _unreadable(self, error: RowError, source: str) -> Dropped:
        if self.options.bad_rows != "skip":
            raise UserError(f"{source}: {error.detail}")
        return Dropped(error.reason, error.detail, unreadable=True)

    def _unwrapped(self, row: SourceRow, place: Place) -> Iterable[tuple[object, str]]:
        """The row itself, or the rows of a container of rows."""
        split = None if row.split is not None or not place.files else place.split
        inside = rows_inside(row.row, self._is_row, split, place.path)
        if split is not None and (inside is None or not inside.splits):
            expected = f"a file or a folder that holds the split {split!r}, or one path alone"
            raise UserError(f"{row.source}: a row of a file without splits; expected {expected}")
        if inside is None:
            return ((row.row, row.source),)
        for key, reason in inside.left_out.items():
            self.options.files.on_left_out(f"{row.source} {key}", reason)
        return ((inner, f"{row.source} {where}".rstrip()) for inner, where in inside.rows)

    def _is_row(self, value: object) -> bool:
        if self.columns:
            return isinstance(value, dict) and not set(self.columns.values()).isdisjoint(value)
        if not isinstance(value, dict):
            return False
        if self.reader is not None:
            return self.reader.fits(value, self.for_prompts)
        return bool(fitting(tuple(value), self.for_prompts))

    def _mapped(self, value: object, source: str, is_first: bool) -> tuple[Row, list[str]]:
        """(the row under the reader's own keys, its other columns that hold something).

        A path's first row must have every mapped column.
        """
        row = object_of(value, "the row")
        assert self.reader is not None, "columns fix the reader"
        for key, column in self.columns.items():
            if column in row or (self.for_prompts and key in self.reader.answers):
                continue
            fault = f"no column {column!r} (data.columns.{key}); keys found: {names(row)}"
            if is_first:
                raise UserError(f"{source}: {fault}")
            if key in (*self.reader.keys, *self.reader.answers):
                raise RowError("missing key", fault)
        mapped = {key: row[column] for key, column in self.columns.items() if column in row}
        used = set(self.columns.values())
        return mapped, [key for key in row if key not in used and row[key] not in EMPTY]
