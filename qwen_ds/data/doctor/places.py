"""The places of records, "file:line", kept in a few bytes each.

Where rows share a line, as in an array on one line, each has its index there: "file:1[7]". The
first of them has one as soon as the second has come.
"""

from __future__ import annotations

import re
from array import array

import numpy as np

# As an int of eight bytes is written: a number with a zero before it would not come back as it was.
_NUMBER = re.compile(
    r"(?P<before>.*?[:#\[])(?P<number>0|[1-9][0-9]{0,16})(?P<after>\]?)", re.DOTALL
)


class Places:
    """The sources of records in order. Most differ in one number only."""

    def __init__(self) -> None:
        self._frames: dict[tuple[str, str], int] = {}
        self._names: list[tuple[str, str]] = []
        self._frame, self._number, self._file = array("i"), array("q"), array("i")
        self._index = array("i")  # among the records of its line, -1: it has that for itself

    def __len__(self) -> int:
        return len(self._number)

    def add(self, source: str, file: int) -> int:
        """Add a record's source and the number of its path; returns the record's number."""
        match = _NUMBER.fullmatch(source)
        frame = (source, "") if match is None else (match["before"], match["after"])
        number = -1 if match is None else int(match["number"])
        known = self._frames.get(frame)
        if known is None:
            known = self._frames[frame] = len(self._names)
            self._names.append(frame)
        index, place = -1, (known, number, file)
        if self._frame and (self._frame[-1], self._number[-1], self._file[-1]) == place:
            self._index[-1] = max(self._index[-1], 0)
            index = self._index[-1] + 1
        self._index.append(index)
        self._frame.append(known)
        self._number.append(number)
        self._file.append(file)
        return len(self._number) - 1

    def text(self, record: int) -> str:
        """A record's source, with its index if others share it."""
        index = self._index[record]
        return self.source(record) + (f"[{index}]" if index >= 0 else "")

    def source(self, record: int) -> str:
        """A record's source as it was given."""
        before, after = self._names[self._frame[record]]
        number = self._number[record]
        return before if number < 0 else f"{before}{number}{after}"

    def file_and_line(self, record: int) -> tuple[str, int | str]:
        """(file, line): what stands before the last colon or hash, and the rest."""
        text = self.text(record)
        before, after = self._names[self._frame[record]]
        is_plain = not after and self._index[record] < 0
        if is_plain and before[-1:] in (":", "#") and self._number[record] >= 0:
            return before[:-1], self._number[record]
        file, _, line = text.rpartition(":")
        return (file, line) if file else (text, "")

    def path_of(self, record: int) -> int:
        """The number of a record's path."""
        return self._file[record]

    def files(self) -> np.ndarray:
        """The number of each record's path, int32."""
        return np.frombuffer(self._file, np.int32) if self._file else np.empty(0, np.int32)
