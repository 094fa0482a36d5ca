"""The rows of an optimizer step, and how they are dealt to the ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from qwen_ds.data.buckets import bucketed
from qwen_ds.data.windows import cut_windows, deal, level_budget
from qwen_ds.plan.activations import MicroBatch
from qwen_ds.recipe.options import BatchOptions

# Standard deviation of the logarithm of row lengths (AdvertiseGen, prompt and answer).
LENGTH_SPREAD = 0.3


@dataclass(frozen=True, slots=True)
class Workload:
    """The rows of one optimizer step."""

    lens: np.ndarray  # int32 [rows], tokens
    target_share: float  # share of target tokens among the real ones, 0 to 1
    longest: int  # tokens of the longest row in any step

    @classmethod
    def like(cls, rows: int, median: int, target_share: float, longest: int) -> Workload:
        """Log-normal lengths at evenly spaced quantiles, so that nothing is random."""
        normal = NormalDist(math.log(median), LENGTH_SPREAD)
        lens = [math.exp(normal.inv_cdf((i + 0.5) / rows)) for i in range(rows)]
        return cls(np.clip(lens, 2, longest).astype(np.int32), target_share, longest)


@dataclass(frozen=True, slots=True)
class Split:
    """A step as its busiest rank sees it."""

    micro_batches: int
    padded_tokens: int
    squared_tokens: int
    largest: MicroBatch  # the micro-batch, of any step, that the memory must hold


def split(workload: Workload, world: int, batch: BatchOptions, *, levels: bool = False) -> Split:
    """Pad a step's rows, cut them into micro-batches and deal them to the ranks, as training
    does; `levels` as of its StepSampler."""
    lens, budget = bucketed(workload.lens), batch.tokens_per_micro_batch
    if levels:
        budget = level_budget([lens], world, budget)
    ranks = deal(lens, cut_windows(lens, world, budget), world)
    # Tokens (rows, and the longest of them) of each rank's micro-batches that have any.
    sizes = [[(len(part), int(lens[part].max())) for part in parts if len(part)] for parts in ranks]
    padded = [sum(rows * length for rows, length in of) for of in sizes]
    busiest = padded.index(max(padded))
    squared = sum(rows * length**2 for rows, length in sizes[busiest])
    rows_per_step = min(batch.rows_per_step, len(lens))
    largest = largest_micro_batch(workload.longest, rows_per_step, budget, world)
    return Split(len(ranks[0]), padded[busiest], squared, largest)


def largest_micro_batch(longest: int, rows_per_step: int, budget: int, world: int) -> MicroBatch:
    """A micro-batch that no micro-batch of a training on such rows exceeds.

    It fills the budget or is one longer row, but holds no more than an even share of a step whose
    rows are all the longest: `cut_windows` makes the largest micro-batch as small as possible.
    Every token may be a target. `longest` and `budget` are in tokens; `rows_per_step` are those of
    all ranks, no more than there are.
    """
    share = math.ceil(rows_per_step / world) * longest
    tokens = max(longest, min(budget, share))
    rows = math.ceil(tokens / longest)
    length = math.ceil(tokens / rows)
    return MicroBatch(rows, length, rows * length)
