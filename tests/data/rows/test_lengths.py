"""The histogram of lengths: every row is counted once, in the bin that its length belongs to."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_ds.data.rows.lengths import MAX_BINS, length_histogram


@pytest.mark.parametrize("longest", [1, 39, 40, 41, 79, 80, 2048, 32768])
def test_each_row_is_in_the_bin_of_its_length(longest: int) -> None:
    tokens = np.array([1, longest // 2 + 1, longest, longest])
    targets = np.array([0, 1, longest - 1, longest // 3])
    found = length_histogram(tokens, targets)
    edges = found["edges"]
    assert edges[0] == 0 and edges[-1] > longest and len(edges) - 1 <= MAX_BINS
    assert len({b - a for a, b in zip(edges, edges[1:], strict=False)}) == 1
    for name, lengths in (("rows", tokens), ("targets", targets)):
        wanted = [
            sum(low <= length < high for length in lengths.tolist())
            for low, high in zip(edges, edges[1:], strict=False)
        ]
        assert found[name] == wanted and sum(wanted) == 4


def test_without_rows_there_are_no_counts() -> None:
    nothing = np.array([], dtype=np.int32)
    assert length_histogram(nothing, nothing) == {"edges": [0], "rows": [], "targets": []}
