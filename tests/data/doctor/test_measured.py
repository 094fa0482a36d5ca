"""The bar: planted defects that are found and named, and sound rows that are left in peace."""

from __future__ import annotations

import io
import json
from pathlib import Path

from qwen_ds.data.doctor.examine import TRAIN, examine
from qwen_ds.data.doctor.judge import judge
from qwen_ds.data.doctor.places import Places
from qwen_ds.data.doctor.tally import FindingTally
from qwen_ds.data.read.sources import ReadOptions
from qwen_ds.recipe.options import DataOptions
from tests.data.doctor.measure import score, write

# One kind of the set is two of ours: of a row, and of a whole column.
NAMES = {"empty-answer": "empty-answer-or-column", "empty-column": "empty-answer-or-column"}


def test_planted_defects_are_found_and_sound_rows_are_not(tmp_path: Path) -> None:
    key = write(tmp_path)
    lines = io.StringIO()
    sides = [(TRAIN, str(path)) for path in sorted(tmp_path.glob("*.jsonl"))]
    gathered = examine(sides, ReadOptions(), FindingTally(Places(), lines), workers=0)
    judge(gathered, DataOptions(), None)
    found = [json.loads(line) for line in lines.getvalue().splitlines()]
    result = score(key, [(row["finding"], row["file"], row["line"]) for row in found], NAMES)
    assert len(result.missed) * 60 <= result.num_planted, str(result)  # 2 of 120
    assert len(result.false) <= 1, str(result)
