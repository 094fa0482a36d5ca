"""The fate of all rows, for data_report.json, and checks that stop a run before training.

A data set is one entry of data.train or data.eval. If none of its rows can be trained on, or all
come out identical, the keys or the format are wrong: a UserError.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen_ds.data.read.dialogue import names
from qwen_ds.data.rows.blocks import Block
from qwen_ds.errors import UserError


@dataclass(slots=True)
class Tally:
    """The number of rows that met one fate, and the first of them."""

    rows: int
    first: str  # file:line
    detail: str = ""


@dataclass(slots=True)
class PartReport:
    """One data set. A source row may give several conversations (a tree), each at most one row."""

    path: str
    formats: dict[str, str] = field(default_factory=dict)
    """By file, the reader that recognised its first row, or that the user named."""
    encodings: dict[str, str] = field(default_factory=dict)
    """By file, the encoding of its text, if it is not UTF-8."""
    left_out: dict[str, str] = field(default_factory=dict)
    """By file of a folder or an archive, why it is not read."""
    read: int = 0  # source rows
    kept: int = 0  # token rows
    dropped: dict[str, Tally] = field(default_factory=dict)
    """Rows with nothing to train on, by reason."""
    skipped: dict[str, Tally] = field(default_factory=dict)
    """Rows that could not be read (data.bad_rows skip), by reason."""
    truncated: dict[str, Tally] = field(default_factory=dict)
    """Rows that were too long, by "prompt cut", "answer cut" or "oldest turns dropped"."""
    not_read: dict[str, int] = field(default_factory=dict)
    """Keys that hold something which is no part of a conversation, and the number of such rows."""
    tokens: int = 0
    learnt_tokens: int = 0  # target tokens
    longest_tokens: int = 0
    longest: str = ""  # file:line of the longest row
    contents: set[int] = field(default_factory=set)  # hashes of its rows, kept until two differ

    def drop(self, reason: str, source: str, detail: str = "", unreadable: bool = False) -> None:
        fates = self.skipped if unreadable else self.dropped
        fates.setdefault(reason, Tally(0, source, detail)).rows += 1

    def cut(self, what: str, source: str) -> None:
        self.truncated.setdefault(what, Tally(0, source)).rows += 1

    def keep(self, block: Block, sources: Sequence[str]) -> None:
        """Count the rows of a block; `sources` has one entry a row."""
        self.kept += len(sources)
        self.tokens += int(block.length_K.sum())
        self.learnt_tokens += int(block.learnt_K.sum())
        longest = int(block.length_K.argmax())
        if block.length_K[longest] > self.longest_tokens:
            self.longest_tokens, self.longest = int(block.length_K[longest]), sources[longest]
        if len(self.contents) < 2:
            self.contents.update(block.content_K.tolist())

    def check(self) -> None:
        """Raise UserError if this data set has nothing to train on, or one row over and over."""
        fates = {**self.skipped, **self.dropped}
        if not self.kept:
            if not fates:
                raise UserError(f"{self.path}: no rows in it; expected one at least")
            reason, most = max(fates.items(), key=lambda fate: fate[1].rows)
            others = f", {len(fates) - 1} other reasons" if len(fates) > 1 else ""
            raise UserError(
                f"{self.path}: none of its {self.read} rows can be trained on: {reason} "
                f"({most.rows} rows, the first {most.first}{others})"
                + (f"; {most.detail}" if most.detail else "")
            )
        if self.kept > 1 and len(self.contents) == 1:
            raise UserError(
                f"{self.path}: all its {self.kept} rows come out identical "
                f"({self.tokens // self.kept} tokens each, the first {self.longest}); "
                "expected rows that differ: check data.format and data.columns"
            )

    def to_dict(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        del found["contents"]
        return found


_FATES = {"dropped": "dropped", "skipped": "could not be read", "truncated": "too long"}


def total(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add up the data sets' reports; for each reason the first data set's place is kept."""
    counts = ("read", "kept", "tokens", "learnt_tokens")
    summed: dict[str, Any] = {key: sum(part[key] for part in parts) for key in counts}
    for key in _FATES:
        summed[key] = {}
        for part in parts:
            for reason, tally in part[key].items():
                known = summed[key].setdefault(reason, {**tally, "rows": 0})
                known["rows"] += tally["rows"]
    for key in ("encodings", "left_out"):
        summed[key] = {file: note for part in parts for file, note in part[key].items()}
    longest = max(parts, key=lambda part: part["longest_tokens"])
    return {**summed, "longest_tokens": longest["longest_tokens"], "longest": longest["longest"]}


def summary(report: dict[str, Any]) -> list[str]:
    """A `TokenRows.report` in a few lines, for the start screen."""
    found = report["total"]
    kept, tokens = found["kept"], found["tokens"]
    lines = [
        f"{kept:,} rows of {found['read']:,} read, {tokens:,} tokens "
        f"({found['learnt_tokens']:,} targets), mean {tokens / kept:.0f}, "
        f"longest {found['longest_tokens']:,}"
    ]
    for key, fate in _FATES.items():
        for reason, tally in found[key].items():
            lines.append(f"{tally['rows']:,} {fate}: {reason} (first {tally['first']})")
    # A report of an earlier version lacks these, and what was not read.
    encodings, left_out = found.get("encodings", {}), found.get("left_out", {})
    lines += _in_words(encodings, "{}: read as {}", "more files are not UTF-8")
    lines += _in_words(left_out, "{}: not read, {}", "more files are not read")
    lines += not_read_lines(report)
    if report["duplicates"]:
        lines.append(f"rows that repeat an earlier one: {report['duplicates']:,}")
    return lines


def not_read_lines(report: dict[str, Any]) -> list[str]:
    """A line for each data set that holds something which is not read."""
    parts = report.get("data_sets", [])
    found = [
        not_read_line(part.get("not_read", {}), part["path"] if parts[1:] else None)
        for part in parts
    ]
    return [line for line in found if line]


def not_read_line(counts: Mapping[str, int], path: str | None = None) -> str:
    """Word the keys that are not read as one line: "not read: id, source (51,200 rows)"."""
    by_count: dict[int, list[str]] = {}
    for key, rows in counts.items():
        by_count.setdefault(rows, []).append(key)
    found = [
        f"{names(by_count[rows], 20)} ({rows:,} row{'s' if rows != 1 else ''})"
        for rows in sorted(by_count, reverse=True)
    ]
    place = f" in {path}" if path is not None else ""
    return f"not read{place}: {', '.join(found)}" if found else ""


_FILES_NAMED = 8


def _in_words(notes: dict[str, str], words: str, others: str) -> list[str]:
    """A line for each of the first notes on files, and one for the number of the others."""
    lines = [words.format(*note) for note in notes.items()]
    rest = len(lines) - _FILES_NAMED
    return [*lines[:_FILES_NAMED], f"{rest:,} {others}"] if rest > 1 else lines
