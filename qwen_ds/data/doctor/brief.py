"""The short check before every run: the first rows of each data set, within a second."""

from __future__ import annotations

from typing import Any

from qwen_ds.data.doctor.examine import EVAL, TRAIN, examine
from qwen_ds.data.doctor.judge import judge
from qwen_ds.data.doctor.places import Places
from qwen_ds.data.doctor.tally import FindingTally
from qwen_ds.data.read.places import locate
from qwen_ds.data.rows.reading import read_options
from qwen_ds.errors import UserError
from qwen_ds.recipe.options import DataOptions
from qwen_ds.terminal import one_line

MOST_ROWS, MOST_LINES = 1000, 5
# What tokenising has counted already, over all rows.
_KNOWN = {"cut-by-limit", "empty-answer", "empty-question", "unreadable-row", "not-trainable"}


def brief(data: DataOptions, most: int = MOST_ROWS) -> list[dict[str, Any]]:
    """Findings in the first rows of data.train and data.eval, at most `most` in all; none where
    rows would have to be fetched. Shares are of the rows that were looked at."""
    paths = [(EVAL, path) for path in data.eval] + [(TRAIN, path) for path in data.train]
    try:
        sides = [(side, path) for side, path in paths if locate(path).hub_id is None]
        tally = FindingTally(Places())
        each = max(1, most // max(len(sides), 1))
        gathered = examine(sides, read_options(data), tally, workers=0, most=each)
    except UserError:  # which the reading of all rows has raised, or will
        return []
    judge(gathered, data, None)
    return [found for found in tally.findings(gathered.files) if found["finding"] not in _KNOWN]


def lines(findings: list[dict[str, Any]]) -> list[str]:
    """Findings in a few lines, for the start screen; notes are left to data_report.json."""
    told = [found for found in findings if found["severity"] != "note"]
    found = [
        f"{each['severity']}: {each['count']:,} {each['finding']}"
        f" (first {one_line(each['examples'][0]['place'])})"
        for each in told[:MOST_LINES]
    ]
    if len(told) > MOST_LINES:
        found.append(f"and {len(told) - MOST_LINES} more kinds: data_report.json")
    return found
