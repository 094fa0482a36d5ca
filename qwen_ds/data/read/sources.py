"""Conversations from the paths of a recipe: files, folders and hub data sets.

A path is a data file of any kind that files.py reads; a folder, whose data files are read in the
order of their names; a folder that `datasets` saved; or the id of a data set on the hub,
"org/name", "org/name:split" or "org/name:config:split". "folder:split" names one of several splits
of a folder; without a name it is "train".

`columns` maps the keys that a reader expects to the columns of the data, {"instruction": "q",
"output": "a"}. Then only the columns named in it are read, by the reader whose keys are named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen_ds.data.read.dialogue import (
    Dropped,
    Outcome,
    Result,
    Row,
    RowError,
    as_conversation,
    as_prompt,
    names,
    object_of,
)
from qwen_ds.data.read.files import DATA_SUFFIXES, chosen_names, numbered_rows, read_rows
from qwen_ds.data.read.files_json import BadRow, SourceRow
from qwen_ds.data.read.readers import TABLE, Reader, find_reader, nearest, reader_named
from qwen_ds.data.read.readers_tree import MessageTrees
from qwen_ds.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPLITS = {
    "train": re.compile(r"(?<![a-z])(?:train|training)(?![a-z])"),
    "validation": re.compile(r"(?<![a-z])(?:validation|valid|val|dev)(?![a-z])"),
    "test": re.compile(r"(?<![a-z])(?:test|testing|eval|evaluation)(?![a-z])"),
}
_ARROW_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Place:
    """The place of one path's rows: files, a folder of `datasets`, or the hub."""

    path: str
    files: tuple[Path, ...] = ()
    saved: Path | None = None
    hub_id: str | None = None
    config: str | None = None
    split: str | None = None


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How rows are read, as a recipe's data.* and the options of serving say it."""

    format: str = "auto"  # a reader's name, or auto: each row finds its own
    columns: Mapping[str, str] | None = None  # see the top of this file
    system: str | None = None  # system text of rows that have none
    bad_rows: Literal["stop", "skip"] = "stop"  # what becomes of a row that cannot be read


def iter_conversations(
    paths: Sequence[str | Path],
    options: ReadOptions = ReadOptions(),
    counts: Counter[str] | None = None,
) -> Iterator[tuple[Result, str]]:
    """The conversations of all paths in order, or a Dropped for a row without one, and its source.

    A row may give several conversations (a tree), several rows one (single messages). Where
    bad_rows is "skip", a row that cannot be read (broken JSON, wrong types, an unknown role,
    unknown keys) comes as a Dropped with `unreadable` set. Options and paths are checked at once,
    not when the first row is asked for. "rows" of `counts` counts the source rows as they are read.
    Where bad_rows is "stop", such a row is a UserError: "source: what came; what was expected".
    """
    reading = _Reading(options, False, Counter() if counts is None else counts)
    results = reading.results([locate(path) for path in paths])
    return ((result, source) for result, _, source in results)


def iter_prompts(
    paths: Sequence[str | Path],
    options: ReadOptions = ReadOptions(),
    seen: list[object] | None = None,
) -> Iterator[tuple[Result, str | None, str]]:
    """Prompts to answer: (the conversation up to its last user turn, the row's own answer, source).

    As iter_conversations, but a row needs no answer: {"content": ..} alone, an instruction alone,
    messages that end with the user, {"prompt": ..}, {"question": ..}, {"query": ..}, {"input": ..}
    or {"text": ..}. The answer is that of the last turn, None where it is missing. A row without a
    question comes as (Dropped, None, source), so that no row is lost. `seen` is given the row that
    the latest prompt came from, as its only element: none, if it came from several.
    """
    reading = _Reading(options, True, Counter())
    reading.seen = [] if seen is None else seen
    return reading.results([locate(path) for path in paths])


def locate(path: str | Path) -> Place:
    """Find the rows of a path without reading them. UserError if they are not there."""
    path = str(path)
    folder, _, split = path.partition(":")
    if Path(path).is_file():
        return Place(path, files=(Path(path),))
    if Path(path).is_dir():
        return _folder(path, Path(path), None)
    if split and Path(folder).is_dir():
        return _folder(path, Path(folder), split)
    hub_id, *rest = path.split(":")
    is_hub_id = _HUB_ID.fullmatch(hub_id) and not hub_id.lower().endswith(DATA_SUFFIXES)
    if is_hub_id and len(rest) <= 2 and not Path(hub_id).parent.exists():
        config = rest[0] if len(rest) == 2 else None
        return Place(path, hub_id=hub_id, config=config, split=rest[-1] if rest else "train")
    expected = "a data file, a folder of them, or a hub id org/name"
    raise UserError(f"{path}: no such file or folder; expected {expected}")


def rows_of(place: Place) -> Iterator[SourceRow | BadRow]:
    """The source rows of a path, file after file."""
    parts = [(f"{file}: the file", read_rows(file)) for file in place.files]
    if place.saved is not None or place.hub_id is not None:
        parts.append((f"{place.path}: the data set", _dataset_rows(place)))
    for name, rows in parts:
        is_empty = True
        for row in rows:
            is_empty = False
            yield row
        if is_empty:
            raise UserError(f"{name} holds no rows; expected at least one")


def _folder(path: str, folder: Path, split: str | None) -> Place:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return Place(path, saved=folder, split=split)
    files = [file for file in folder.rglob("*") if file.is_file()]
    found = chosen_names(file.relative_to(folder).as_posix() for file in files)
    if not found:
        expected = "files such as *.json, *.parquet, *.csv"
        raise UserError(f"{path}: the folder holds no data files; expected {expected}")
    of_split = {name: _split_of(name) for name in found}
    wanted = [name for name in found if of_split[name] in ((split,) if split else ("train", None))]
    if split and not wanted:
        known = names(sorted({of for of in of_split.values() if of}))
        raise UserError(f"{path}: no file is named for the split {split!r}; splits found: {known}")
    return Place(path, files=tuple(folder / name for name in wanted or found), split=split)


def _split_of(name: str) -> str | None:
    """The split that a file or its folder is named for, as `datasets` recognises it."""
    for part in reversed(name.lower().split("/")):
        for split, word in _SPLITS.items():
            if word.search(part):
                return split
    return None


def _dataset_rows(place: Place) -> Iterator[SourceRow | BadRow]:
    import datasets

    try:
        if place.saved is not None:
            data = datasets.load_from_disk(str(place.saved))
        else:
            data = datasets.load_dataset(place.hub_id, place.config, split=place.split)
    # Network, hub and library raise all kinds of errors; they all mean that the path did not load.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
        hub = "no such file or folder, and as a data set of the hub it"
        raise UserError(
            f"{place.path}: {'the folder' if place.saved else hub} could not be loaded ({reason}); "
            "expected a data file, a folder of data files, or the id of a data set that can be "
            "reached"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        split = place.split or ("train" if "train" in data or len(data) != 1 else next(iter(data)))
        if split not in data:
            raise UserError(f"{place.path}: no split {split!r}; splits found: {names(data)}")
        data = data[split]
    elif place.saved is not None and place.split is not None:
        raise UserError(
            f"{place.path}: the folder holds one data set without splits; expected {place.saved}"
        )
    yield from numbered_rows(data.with_format("arrow").iter(batch_size=_ARROW_ROWS), place.path)


class _Reading:
    """ReadOptions, checked, and what they make of a row."""

    def __init__(self, options: ReadOptions, for_prompts: bool, counts: Counter[str]) -> None:
        self.options, self.for_prompts, self.counts = options, for_prompts, counts
        self.seen: list[object] = []
        self.columns = options.columns or {}
        self.reader = None if options.format == "auto" else reader_named(options.format)
        if self.columns:
            self.reader = self._reader_of_columns()

    def _reader_of_columns(self) -> Reader:
        readers = [self.reader] if self.reader else list(TABLE)
        known = {key for each in readers for key in each.all_keys}
        unknown = [key for key in self.columns if key not in known]
        if unknown:
            raise UserError(
                f"data.columns has the key {unknown[0]!r}; expected keys of a format: "
                f"{names(sorted(known), 40)}"
            )
        keys = set(self.columns)
        for each in readers:
            if each.fits(keys, self.for_prompts) and keys.issubset(each.all_keys):
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
                yield self._explained(result, row), reference, source

    def _outcomes(self, place: Place) -> Iterator[tuple[Outcome, str, object]]:
        """Every outcome of a path, with its source and, if one row gave it, that row."""
        trees = MessageTrees()
        is_first = True
        for row in rows_of(place):
            self.counts["rows"] += 1
            if isinstance(row, BadRow):
                error = RowError(row.reason, row.detail)
                yield self._unreadable(error, row.source), row.source, None
                continue
            for value, source in self._unwrapped(row):
                self.seen[:] = [value]
                try:
                    if self.columns:
                        value = self._mapped(value, source, is_first)
                        is_first = False
                    reader, found = self._recognised(value)
                    if reader.read is None:
                        trees.add(found, source)
                        continue
                    outcomes = reader.read(found)
                except RowError as error:
                    yield self._unreadable(error, source), source, value
                    continue
                for outcome in outcomes:
                    yield outcome, source, value
        self.seen.clear()
        for outcome, source in trees.outcomes():
            yield outcome, source, None

    def _explained(self, result: Result, row: object) -> Result:
        """The result; a Dropped without a detail names the row's keys and those of its format."""
        if not isinstance(result, Dropped) or result.detail or not isinstance(row, dict):
            return result
        expected = (self.reader or find_reader(row, self.for_prompts)).expected
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

    def _unwrapped(self, row: SourceRow) -> Iterator[tuple[object, str]]:
        """The row itself, or the rows of an object of lists of rows (Safety-Prompts)."""
        value = row.row
        if isinstance(value, dict) and all(isinstance(rows, list) for rows in value.values()):
            inner = next((inner for rows in value.values() for inner in rows), None)
            if not self._is_row(value) and self._is_row(inner):
                for name, rows in value.items():
                    for place, inner in enumerate(rows):
                        yield inner, f"{row.source} {name}[{place}]"
                return
        yield value, row.source

    def _is_row(self, value: object) -> bool:
        if self.columns:
            return isinstance(value, dict) and not set(self.columns.values()).isdisjoint(value)
        with suppress(RowError):
            self._recognised(value)
            return True
        return False

    def _mapped(self, value: object, source: str, is_first: bool) -> Row:
        """The row under the reader's own keys. A path's first row must have every mapped column."""
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
        return {key: row[column] for key, column in self.columns.items() if column in row}
