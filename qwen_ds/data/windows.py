"""The rows of a step, cut into micro-batches and dealt to the ranks.

Shapes: N rows of one step.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

# A dummy row is two pads: the loss's shift leaves one position, whose label is IGNORE.
DUMMY_TOKENS = 2
# With so many tokens a GPU is busy for longer than a CPU takes to launch the operations: at 18,000
# tokens/s for 57 ms, where the launches of a 7B under ZeRO-2 take 30 (plan/seconds.py).
LEAST_TOKENS = 1024
# Products are computed in tiles of 64 tokens and more, of which the last is half empty on average.
TILE_TOKENS = 32


def level_budget(steps: Sequence[np.ndarray], world: int, budget: int) -> int:
    """The budget with which the micro-batches of these steps take the least time: `budget`, or it
    halved again and again, and of equal ones the largest.

    Few large micro-batches hold rows of unlike lengths: 128 of AdvertiseGen's rows on one rank are
    padded by 17 % at 8,192 tokens, by 6 % at 2,048. Small ones leave a GPU idle. Time counts in
    padded tokens, at least LEAST_TOKENS of each micro-batch, and TILE_TOKENS more.

    Args:
        steps: int [N] each, the lengths of the rows of some steps.
        world: ranks.
        budget: most padded tokens of a micro-batch.
    """

    def time(candidate: int) -> int:
        parts = ((lens, part) for lens in steps for part in cut_windows(lens, world, candidate))
        sizes = (padded_tokens(lens, part) for lens, part in parts)
        return sum(max(size + TILE_TOKENS, LEAST_TOKENS) for size in sizes)

    candidates = [budget]
    while candidates[-1] // 2 >= LEAST_TOKENS:
        candidates.append(candidates[-1] // 2)
    return min(candidates, key=time)


def cut_windows(lens: np.ndarray, n_parts_multiple_of: int, budget: int) -> list[np.ndarray]:
    """Cut the rows of a step into micro-batches of nearly equal padded tokens (rows * longest row).

    Rows are sorted by length, longest first, and a micro-batch is a run of them. The number of
    micro-batches is the smallest multiple of `n_parts_multiple_of` that keeps each within the
    budget. The largest is then made as small as that number allows, by bisection over the cap:
    filling greedily under a cap needs the fewest runs.

    Args:
        lens: [N], tokens of each row, all positive.
        n_parts_multiple_of: the world size.
        budget: most padded tokens of a micro-batch. A longer row gets one of its own.

    Returns:
        Arrays of positions in `lens`, longest rows first. Empty arrays, always last, stand for
        dummy rows where there are fewer rows than micro-batches.
    """
    n = len(lens)
    order = np.argsort(-lens.astype(np.int64), kind="stable")
    sorted_lens = lens[order].tolist()
    needed = len(_fill(sorted_lens, budget))
    n_parts = max(1, math.ceil(needed / n_parts_multiple_of)) * n_parts_multiple_of
    if n == 0:
        return [order] * n_parts
    n_runs = min(n_parts, n)

    def is_enough(cap: int) -> bool:
        return len(_fill(sorted_lens, cap)) <= n_runs

    cap = 1 + bisect_left(range(1, budget), True, key=is_enough)
    runs = _split_to(_fill(sorted_lens, cap), sorted_lens, n_runs)
    return [order[start:end] for start, end in runs] + [order[:0]] * (n_parts - n_runs)


def _fill(sorted_lens: list[int], cap: int) -> list[tuple[int, int]]:
    """Runs (start, end) of longest-first rows, each as long as the cap allows and never empty."""
    runs, start = [], 0
    while start < len(sorted_lens):
        end = min(len(sorted_lens), start + max(1, cap // sorted_lens[start]))
        runs.append((start, end))
        start = end
    return runs


def _split_to(
    runs: list[tuple[int, int]], sorted_lens: list[int], n_runs: int
) -> list[tuple[int, int]]:
    """Halve the largest runs until there are n_runs: there can be fewer, since raising the cap by
    one token can save more than one run."""
    while len(runs) < n_runs:
        largest = max(
            (i for i, (start, end) in enumerate(runs) if end - start > 1),
            key=lambda i: (runs[i][1] - runs[i][0]) * sorted_lens[runs[i][0]],
        )
        start, end = runs[largest]
        middle = (start + end) // 2
        runs[largest : largest + 1] = [(start, middle), (middle, end)]
    return runs


def deal(lens: np.ndarray, parts: Sequence[np.ndarray], world: int) -> list[list[np.ndarray]]:
    """Give each rank the same number of micro-batches.

    The i-th micro-batches of all ranks are neighbours in length, because ranks run in lock-step
    under ZeRO-3. Of these the largest goes to the rank with the least so far, which evens out the
    totals. The parts of each rank come longest rows first.
    """
    totals = [0] * world
    ranks: list[list[np.ndarray]] = [[] for _ in range(world)]
    for first in range(0, len(parts), world):
        by_size = sorted(parts[first : first + world], key=lambda part: -padded_tokens(lens, part))
        for part, rank in zip(by_size, sorted(range(world), key=totals.__getitem__), strict=True):
            ranks[rank].append(part)
            totals[rank] += padded_tokens(lens, part)
    return ranks


def width_of(lens: np.ndarray, part: np.ndarray) -> int:
    """Tokens of the longest row of a micro-batch, or of a dummy."""
    return int(lens[part].max()) if len(part) else DUMMY_TOKENS


def padded_tokens(lens: np.ndarray, part: np.ndarray) -> int:
    """Tokens that a micro-batch computes."""
    return max(1, len(part)) * width_of(lens, part)
