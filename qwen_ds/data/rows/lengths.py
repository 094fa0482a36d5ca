"""The histogram of row lengths that data_report.json has."""

from __future__ import annotations

from typing import Any

import numpy as np

MAX_BINS = 40


def length_histogram(tokens: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """How many rows have how many tokens, and how many target tokens: {"edges", "rows", "targets"}.

    Bin i of both counts lengths from edges[i] to below edges[i + 1]. All bins are equally wide, a
    whole number of tokens, at most MAX_BINS of them, and they begin at 0. Without rows there are no
    counts.

    Args:
        tokens, targets: int [rows].
    """
    if not len(tokens):
        return {"edges": [0], "rows": [], "targets": []}
    longest = int(tokens.max())
    width = longest // MAX_BINS + 1
    edges = np.arange(0, longest + width + 1, width)
    counts = {
        name: np.histogram(lengths, edges)[0].tolist()
        for name, lengths in (("rows", tokens), ("targets", targets))
    }
    return {"edges": edges.tolist(), **counts}
