"""Findings as they come: counts, the first examples, the kinds of each record, findings.jsonl."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from qwen_ds.data.doctor.files import FileColumns
from qwen_ds.data.doctor.kinds import KINDS, SEVERITIES, Severity
from qwen_ds.data.doctor.places import Places
from qwen_ds.data.doctor.spans import Shown

EXAMPLES = 3
NAMES = tuple(KINDS)
_BIT = {kind: 1 << place for place, kind in enumerate(NAMES)}
LEAVES = sum(_BIT[name] for name, kind in KINDS.items() if kind.of_rows and kind.severity != "note")
"""The kinds for which a record is left out of a clean file."""


@dataclass(slots=True)
class FindingTally:
    """All findings of a pass.

    Attributes:
        places: of the records.
        file: takes a line for each finding and record; None: nobody asked.
        paths: the numbers of the paths in which each kind was found.
        flags: for each record the bits of its kinds.
    """

    places: Places
    file: TextIO | None = None
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    advice: dict[str, str] = field(default_factory=dict)
    paths: dict[str, set[int]] = field(default_factory=dict)
    flags: array[int] = field(default_factory=lambda: array("Q"))

    def grow(self) -> None:
        """Make room for one more record."""
        self.flags.append(0)

    def add(self, kind: str, record: int, shown: Shown) -> None:
        """Count a finding in a record; the same kind counts once."""
        bit = _BIT[kind]
        if self.flags[record] & bit:
            return
        self.flags[record] |= bit
        self.counts[kind] += 1
        self._show(kind, record, shown)

    def add_file(self, kind: str, count: int, record: int, shown: Shown) -> None:
        """Count a finding about `count` rows of a file, shown by one record."""
        self.counts[kind] += count
        self._show(kind, record, shown)

    def _show(self, kind: str, record: int, shown: Shown) -> None:
        self.paths.setdefault(kind, set()).add(self.places.path_of(record))
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            example = {
                "place": self.places.text(record),
                "before": shown.before,
                "marked": shown.marked,
                "after": shown.after,
            }
            examples.append(example | ({"detail": shown.detail} if shown.detail else {}))
        if self.file is not None:
            file, line = self.places.file_and_line(record)
            text = f"{shown.before}[[{shown.marked}]]{shown.after}" if shown.marked else ""
            found = {"finding": kind, "severity": KINDS[kind].severity, "file": file, "line": line}
            detail = ": ".join(part for part in (shown.detail, text) if part)
            json_line = json.dumps(found | {"detail": detail}, ensure_ascii=False)
            self.file.write(f"{json_line}\n")

    def kinds_of(self, record: int) -> list[str]:
        """The kinds that keep a record out of a clean file."""
        flags = self.flags[record]
        return [name for name in NAMES if flags & _BIT[name] & LEAVES]

    def leaves_out(self, record: int) -> bool:
        return bool(self.flags[record] & LEAVES)

    def findings(self, files: Sequence[tuple[int, FileColumns]]) -> list[dict[str, Any]]:
        """All findings, the worst first, as data_report.json and summary.json have them.

        `files` has the side and the columns of each path: a share is of all rows of the sides that
        have the finding.
        """
        rows: Counter[int] = Counter()
        for side, columns in files:
            rows[side] += columns.rows
        rows_of = {
            kind: sum(rows[side] for side in {files[path][0] for path in paths})
            for kind, paths in self.paths.items()
        }
        order = sorted(
            self.counts,
            key=lambda kind: (SEVERITIES.index(KINDS[kind].severity), -self.counts[kind]),
        )
        return [
            {
                "finding": kind,
                "severity": KINDS[kind].severity,
                "count": self.counts[kind],
                "share": round(self.counts[kind] / max(rows_of[kind], 1), 6),
                "examples": self.examples.get(kind, []),
                "advice": self.advice.get(kind, KINDS[kind].advice),
            }
            for kind in order
        ]


def has_any(findings: Sequence[dict[str, Any]], severity: Severity) -> bool:
    """Whether a finding is as bad as that, or worse."""
    bad = SEVERITIES[: SEVERITIES.index(severity) + 1]
    return any(each["severity"] in bad for each in findings)
