"""Files that a check writes: findings, summary and page, the rows that pass and those that do not.

All are complete or absent, none is an input, and none replaces a file unless the user says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from qwen_ds.data.doctor.tally import FindingTally
from qwen_ds.data.read.dialogue import Dropped, Result
from qwen_ds.data.read.places import locate
from qwen_ds.disk.place import output_file, refuse_input, require_folder, unwritable
from qwen_ds.disk.write import replacing, write_json, write_text
from qwen_ds.errors import UserError

FINDINGS, SUMMARY, PAGE, LOSSES = "findings.jsonl", "summary.json", "report.html", "losses.jsonl"
DROPPED = "dropped.jsonl"


@dataclass(frozen=True, slots=True)
class CheckOutputs:
    """Where a check writes; None where nobody asked for it."""

    folder: Path | None
    clean: Path | None


def outputs(
    folder: str | None, clean: str | None, inputs: list[str], overwrite: bool
) -> CheckOutputs:
    """Check the places before any work. UserError: a file that exists, an input, no place for it.

    Args:
        inputs: all paths that are read.
    """
    read: list[Path | str] = [*inputs, *(file for path in inputs for file in locate(path).files)]
    files: list[Path] = []
    place = None
    if folder is not None:
        place = Path(folder)
        require_folder(place)
        files += [place / name for name in (FINDINGS, SUMMARY, PAGE, LOSSES)]
    written = None
    if clean is not None:
        written = output_file(clean)
        if written.name == DROPPED:
            raise UserError(f"--write is {clean}; expected another name: {DROPPED} gets the rest")
        if not written.parent.is_dir() and written.parent != Path(os.path.realpath(folder or "")):
            raise UserError(f"{written.parent}: no such folder; expected one for --write")
        files += [written, written.with_name(DROPPED)]
    for file in files:
        refuse_input(file, read)
        if file.exists() and not overwrite:
            raise UserError(f"{file}: exists; expected a new file, or --overwrite")
        output_file(file)
    if place is not None:
        require_folder(place, make=True)
    return CheckOutputs(place, written)


@contextlib.contextmanager
def findings_file(places: CheckOutputs) -> Iterator[TextIO | None]:
    """A file that takes a line for each finding and row; None if nobody asked for one."""
    if places.folder is None:
        yield None
        return
    with writing(places.folder / FINDINGS) as file:
        yield file


@contextlib.contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """Open a file for text, complete or absent. What UTF-8 lacks is spelled as JSON spells it.
    UserError if it cannot be written."""
    with ExitStack() as stack:
        try:
            unfinished = stack.enter_context(replacing(path))
            file = stack.enter_context(
                unfinished.open("w", encoding="utf-8", errors="backslashreplace")
            )
        except OSError as error:
            raise unwritable(path, error) from error
        yield file


def write_results(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json and the page of it."""
    from qwen_ds.data.doctor.page import page

    write_json(folder / SUMMARY, summary)
    write_text(folder / PAGE, page(summary))


class Sorting:
    """Rows on their way to the clean file or to dropped.jsonl.

    Whether a row passes is known only when all have been read, so their JSON waits in a file
    without a name, on the disk of the clean file.
    """

    def __init__(self, clean: Path) -> None:
        self._clean = clean
        try:
            self._file = tempfile.TemporaryFile(dir=clean.parent)  # noqa: SIM115
        except OSError as error:
            raise unwritable(clean.parent, error) from error
        self._records, self._sizes = array("q"), array("q")

    def add(self, record: int, row: object, result: Result) -> None:
        """Keep a record's row; of one that several rows gave, its conversation."""
        if row is None and not isinstance(result, Dropped):
            first = [] if result.system is None else [("system", result.system)]
            turns = [*first, *((turn.role, turn.text) for turn in result.turns)]
            row = {"messages": [{"role": role, "content": text} for role, text in turns]}
        line = json.dumps(row, ensure_ascii=False, default=str)
        self._sizes.append(self._file.write(line.encode(errors="backslashreplace")))
        self._records.append(record)

    def write(self, tally: FindingTally) -> int:
        """Write both files; returns how many rows pass."""
        kept = 0
        self._file.seek(0)
        dropped = self._clean.with_name(DROPPED)
        with writing(self._clean) as good, writing(dropped) as bad:
            for record, size in zip(self._records, self._sizes, strict=True):
                line = self._file.read(size).decode()
                if not tally.leaves_out(record):
                    good.write(f"{line}\n")
                    kept += 1
                    continue
                about: dict[str, Any] = {
                    "source": tally.places.text(record),
                    "reasons": tally.kinds_of(record),
                }
                head = json.dumps(about, ensure_ascii=False)
                bad.write(f'{head[:-1]}, "row": {line}}}\n')
        return kept

    def close(self) -> None:
        self._file.close()
