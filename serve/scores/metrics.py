"""Two profiles as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from serve.scores import profiles
from serve.scores.measured import Measured
from serve.scores.rows import ScoredRow
from serve.scores.segmentation import Words

Scores = Measured


def score_all(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Measured]:
    """Scores of the rows: {"seed": .., "rouge-score": ..}."""
    rows = [ScoredRow(p, (r,)) for p, r in zip(predictions, references, strict=True)]
    words = Words()
    return {"seed": profiles.seed(rows, words), "rouge-score": profiles.rouge_score(rows, words)}


def table(scores: dict[str, Measured]) -> str:
    """Plain-text table: a line per profile and measure; F, P and R with 4 decimals."""
    lines = [f"{'profile':<13}{'measure':<15}{'F':>8}{'P':>8}{'R':>8}"]
    for profile, measured in scores.items():
        for name, value in measured.as_dict().items():
            figures = [value[key] for key in "fpr"] if isinstance(value, dict) else [value]
            shown = "".join(f"{figure:>8.4f}" for figure in figures)
            lines.append(f"{profile:<13}{name:<15}{shown}")
    return "\n".join(lines)
