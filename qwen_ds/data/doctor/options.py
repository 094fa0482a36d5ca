"""Options of `python -m qwen_ds.data check`: the command line is made from this class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qwen_ds.recipe.options import DataOptions
from qwen_ds.recipe.ranges import NonNegativeInt, PathText


@dataclass(frozen=True, kw_only=True)
class CheckCommand:
    """Options of check."""

    data: DataOptions
    against: list[PathText] = field(default_factory=list)
    """Test sets, of any format: training rows that occur in them are found."""
    model: PathText | None = None
    """Folder or hub id of a Qwen checkpoint. Its vocabulary counts the tokens, and its loss ranks
    the rows."""
    adapter: PathText | None = None
    """Folder of the adapter that was trained on these rows, for the ranking."""
    worst: NonNegativeInt = 40
    """How many of the rows with the highest loss are findings."""
    write: PathText | None = None
    """File for the training rows that pass, as they were read, one JSON object a line. The others
    go to dropped.jsonl beside it, with the reasons."""
    output: PathText | None = None
    """Folder for findings.jsonl, summary.json and report.html."""
    overwrite: bool = False
    """Let --write and --output replace what a check wrote before."""
    fail_on: Literal["stop", "warn", "note", "never"] = "never"
    """End with exit code 1 if there is a finding of this severity, or a worse one."""
