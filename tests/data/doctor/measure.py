"""The measuring set as files, its key, and the score of a list of findings against it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.data.doctor.clean import SEED, clean_rows
from tests.data.doctor.planted import ROWS_FILE, Planted, as_dict, filling, planted

KEY = "key.json"
Found = tuple[str, str, int | None]  # finding, name of the file, line from 1, or none for the file


@dataclass(frozen=True, slots=True)
class Expected:
    """A planted defect: one of the findings must stand at one of the places."""

    kind: str
    instance: int
    findings: tuple[str, ...]
    places: tuple[tuple[str, int], ...]
    whole_file: bool


@dataclass(frozen=True, slots=True)
class Score:
    """Planted defects that no finding names, and findings on clean rows."""

    num_planted: int
    missed: list[Expected]
    false: list[Found]

    @property
    def num_found(self) -> int:
        return self.num_planted - len(self.missed)

    def __str__(self) -> str:
        text = f"{self.num_found} of {self.num_planted} found, {len(self.false)} false"
        misses = [f"missed {e.kind} {e.instance}: {e.places[0]}" for e in self.missed]
        return "\n".join([text, *misses, *(f"false {f}" for f in self.false)])


def write(folder: Path) -> list[Expected]:
    """Write the data files and key.json into an existing folder; return the key.

    rows.jsonl holds the thousand clean rows with the defects of rows at random lines among them,
    the rows of one defect in their order.
    """
    defects = planted()
    files: dict[str, list[dict[str, Any]]] = {
        ROWS_FILE: [as_dict(row.instruction, row.output) for row in clean_rows()],
        **filling(),
    }
    owners = mixed(files, defects)
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    key = []
    counts: dict[str, int] = {}
    for defect in defects:
        counts[defect.kind] = counts.get(defect.kind, 0) + 1
        places = tuple(owners[id(row)] for row in defect.rows)
        key.append(
            Expected(defect.kind, counts[defect.kind], defect.findings, places, defect.whole_file)
        )
    text = json.dumps([asdict(expected) for expected in key], ensure_ascii=False, indent=1)
    (folder / KEY).write_text(text + "\n", encoding="utf-8")
    return key


def mixed(
    files: dict[str, list[dict[str, Any]]], defects: list[Planted]
) -> dict[int, tuple[str, int]]:
    """Put the rows of the defects into the files; return the place of each row by its id()."""
    rng = Random(SEED)
    wanted: dict[str, list[list[dict[str, Any]]]] = {}
    for defect in defects:
        for name in dict.fromkeys(defect.files):
            rows = [row for row, at in zip(defect.rows, defect.files, strict=True) if at == name]
            wanted.setdefault(name, []).append(rows)
    places = {}
    for name, groups in wanted.items():
        sound = files.get(name, [])
        at = [
            (position, row)
            for rows in groups
            for position, row in zip(
                sorted(rng.random() for _ in rows) if sound else range(len(rows)),
                rows,
                strict=True,
            )
        ]
        at += [(rng.random(), row) for row in sound]
        files[name] = [row for _, row in sorted(at, key=lambda pair: pair[0])]
        numbers = {id(row): number for number, row in enumerate(files[name], 1)}
        places |= {id(row): (name, numbers[id(row)]) for rows in groups for row in rows}
    return places


def score(
    key: list[Expected], found: Iterable[Found], names: Mapping[str, str] | None = None
) -> Score:
    """Compare findings with the key; `names` translates a detector's name where it differs.

    A finding on a line that no defect owns is false; findings on a whole file are not judged.
    """
    names = names or {}
    heard = {(names.get(finding, finding), Path(file).name, line) for finding, file, line in found}
    missed = []
    owned = {place for expected in key for place in expected.places}
    for expected in key:
        places = set(expected.places)
        if expected.whole_file:
            places |= {(expected.places[0][0], None)}
        if not any((name, *place) in heard for name in expected.findings for place in places):
            missed.append(expected)
    broken = {expected.places[0][0] for expected in key if expected.whole_file}
    false = [
        (finding, file, line)
        for finding, file, line in heard
        if line is not None and file not in broken and (file, line) not in owned
    ]
    return Score(len(key), missed, sorted(false, key=str))
