"""The planner: what a recipe needs on a machine before it runs, and the least recomputation that fits a memory.

Memory comes from plan/memory.py. Time is the sum of what the busiest rank does: matrix products, attention, passes
over memory, the optimizer, and what of the communication does not hide behind them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from qwen_ds.data.batches import cut_windows, deal
from qwen_ds.plan import activations, flops
from qwen_ds.plan.activations import FP32, Saving
from qwen_ds.plan.gpus import Gpu
from qwen_ds.plan.memory import Memory, MicroBatch, peak_memory, trained_parameters
from qwen_ds.plan.shape import ENDS, LINEARS, Shape
from qwen_ds.plan.traffic import Links, Load, Tensors, Zero, traffic
from qwen_ds.recipe.options import BatchOptions

# Shares of a GPU's peak that well-shaped kernels reach: cuBLAS in bf16 (an H200 gives about 790 of its 989 TFLOP/s),
# and FlashAttention 2 forward and backward together (Dao 2023, section 4: 50 to 73 % on an A100).
PRODUCTS_SHARE, ATTENTION_SHARE = 0.8, 0.5
# A saved number is written and read once forward and, with its gradient, once each backward.
PASSES = 4
# PyTorch dispatches an operation in some 7 microseconds of one CPU core. A block runs about 25 forward, and 7 more for
# each LoRA branch; its backward pass twice as many. A GPU that is done sooner waits for the CPU.
DISPATCH, BLOCK_OPERATIONS, BRANCH_OPERATIONS = 7e-6, 25, 7
# What stays free: the allocator's fragments, and what a library allocates that no formula knows.
MARGIN = 0.08


@dataclass(frozen=True, slots=True)
class Workload:
    """The rows of one optimizer step."""

    lens: np.ndarray
    """int32 [rows], tokens."""
    learnt_share: float
    """Learnt tokens of the real ones, 0 to 1."""
    longest: int
    """Tokens of the longest row that may come in any step."""

    @classmethod
    def like(cls, rows: int, median: int, learnt_share: float, longest: int) -> Workload:
        """Log-normal lengths as instruction data have them (AdvertiseGen's prompts and answers together: 0.3), at the
        middles of equal shares of the distribution; no random draw."""
        normal = NormalDist(math.log(median), 0.3)
        lens = [math.exp(normal.inv_cdf((i + 0.5) / rows)) for i in range(rows)]
        return cls(np.clip(lens, 2, longest).astype(np.int32), learnt_share, longest)


@dataclass(frozen=True, slots=True)
class Split:
    """How a step lies on its busiest rank."""

    micro_batches: int
    padded_tokens: int
    squared_tokens: int
    largest: MicroBatch
    """The micro-batch that the memory must hold, of any step."""


def split(workload: Workload, world: int, budget: int) -> Split:
    """Cut and deal the step as training does."""
    ranks = deal(workload.lens, cut_windows(workload.lens, world, budget), world)

    def sizes(parts: Sequence[np.ndarray]) -> list[tuple[int, int]]:
        return [(len(part), int(workload.lens[part].max())) for part in parts if len(part)]

    busiest = max(
        (sizes(parts) for parts in ranks), key=lambda of: sum(rows * length for rows, length in of)
    )
    # Other steps are a little larger or smaller than this one, whose lengths are the typical ones.
    seen = max(rows * length for rows, length in busiest)
    tokens = max(workload.longest, min(budget, math.ceil(1.2 * seen)))
    return Split(
        len(ranks[0]),
        sum(rows * length for rows, length in busiest),
        sum(rows * length**2 for rows, length in busiest),
        _of_tokens(tokens, workload.longest, workload.learnt_share),
    )


def largest_micro_batch(lens: np.ndarray, batch: BatchOptions, world: int) -> MicroBatch:
    """A micro-batch that none of training on these rows exceeds.

    It is full to the budget, or one longer row; and never more than an even share of the longest rows, since cutting
    makes the largest micro-batch as small as can be. Every token may be learnt.
    """
    longest = int(lens.max())
    share = math.ceil(min(batch.rows_per_step, len(lens)) / world) * longest
    tokens = max(longest, min(batch.tokens_per_micro_batch, share))
    return _of_tokens(tokens, longest, 1.0)


def _of_tokens(tokens: int, longest: int, learnt_share: float) -> MicroBatch:
    """Equal rows, none longer than the longest, that hold at least so many tokens."""
    rows = math.ceil(tokens / longest)
    length = math.ceil(tokens / rows)
    return MicroBatch(rows, length, math.ceil(rows * length * learnt_share))


@dataclass(frozen=True, slots=True)
class Seconds:
    """Predicted time of one optimizer step."""

    products: float
    attention: float
    passes: float
    optimizer: float
    idle: float
    """While the CPU dispatches."""
    waiting: float
    """For communication that nothing hides."""

    @property
    def total(self) -> float:
        return (
            self.products + self.attention + self.passes + self.optimizer + self.idle + self.waiting
        )


def step_seconds(
    shape: Shape,
    how: Saving,
    zero: Zero,
    links: Links,
    gpu: Gpu,
    work: Split,
    learnt_share: float,
    every: int,
) -> Seconds:
    """Time of one optimizer step on the busiest rank; every: see `peak_memory`."""
    trained = trained_parameters(shape, how)
    adapter = 0 if how.full else trained
    again = activations.recomputed_blocks(shape.layers, every) / shape.layers
    a_weight = 6 if how.full else 4
    per_token = (a_weight + 2 * again) * shape.block_matrices + (6 + 2 * again) * adapter
    learnt = work.padded_tokens * learnt_share
    products = (work.padded_tokens * per_token + a_weight * learnt * shape.head) / (
        PRODUCTS_SHARE * gpu.flops
    )
    attention = (
        flops.attention_flops(shape, work.squared_tokens)
        * (1 + again / 3)
        / (ATTENTION_SHARE * gpu.flops)
    )
    of_block = activations.block_bytes(
        shape, how, work.largest.rows, work.largest.length, first=False
    )
    saved = shape.layers * of_block * work.padded_tokens / work.largest.tokens
    passes = saved * PASSES * (1 + again / 2) / gpu.bandwidth
    # AdamW reads gradient, parameter and two moments, and writes all but the first.
    optimizer = 7 * FP32 * trained * zero.share(1) / gpu.bandwidth
    operations = (
        shape.layers * (BLOCK_OPERATIONS + BRANCH_OPERATIONS * len(how.targets)) * (3 + again)
    )
    busy = products + attention + passes
    idle = max(0.0, work.micro_batches * operations * DISPATCH - busy)
    sent = traffic(zero, load(shape, how, zero, work.micro_batches))
    last = sum(links.seconds(c) for c in sent if c.name == "gather updated parameters")
    beside = sum(links.seconds(c) for c in sent) - last
    # ZeRO-0 and 1 average once a step: beside the last micro-batch alone.
    while_busy = (busy + idle) / (1 if zero.stage > 1 else work.micro_batches)
    hidden = min(beside, while_busy) if zero.overlap else 0.0
    return Seconds(products, attention, passes, optimizer, idle, last + beside - hidden)


def load(shape: Shape, how: Saving, zero: Zero, micro_batches: int) -> Load:
    """What ZeRO must send; ZeRO-3's small tensors lie on every rank.

    The backward pass gathers neither lm_head, which is still there, nor what no gradient flows through: an embedding
    that is not trained whole, and the first block's c_attn where nothing of the embedding is trained.
    """
    c_attn = float(how.b * math.prod(shape.linear("c_attn")))
    ends = {
        name: float((FP32 if name in how.whole and not how.full else how.b) * shape.head)
        for name in ENDS
    }
    frozen = [
        float(how.b * math.prod(shape.linear(name))) for name in LINEARS
    ] * shape.layers + list(ends.values())
    adapters = [
        FP32 * how.r * width for name in how.targets for width in shape.linear(name)
    ] * shape.layers
    spread = [float(size) for size in adapters if size > FP32 * zero.small]
    kept = Tensors.of([float(size) for size in adapters if size <= FP32 * zero.small])
    forward = Tensors.of(frozen + spread)
    once = Tensors.of(
        [
            ends["lm_head"],
            *([] if "wte" in how.whole else [ends["wte"]]),
            *([] if how.embedding else [c_attn]),
        ]
    )
    return Load(
        forward,
        Tensors(forward.size - once.size, forward.count - once.count),
        forward if how.full else Tensors.of(spread + [ends[name] for name in how.whole]),
        Tensors(kept.size + how.b * shape.small_parameters, kept.count + 3 * shape.layers + 1),
        trained_parameters(shape, how),
        micro_batches,
    )


def recomputations(layers: int) -> list[int]:
    """Every choice of `every` from no recomputation to all: 0, then the fewest blocks first, at last 1."""
    by_count = {
        activations.recomputed_blocks(layers, every): every for every in range(layers, 0, -1)
    }
    return [0, *(by_count[count] for count in sorted(by_count))]


def least_recomputation(layers: int, fits: Callable[[int], bool]) -> int | None:
    """The first of `recomputations` that fits, or None."""
    return next((every for every in recomputations(layers) if fits(every)), None)


def in_recipe(every: int) -> Literal["none", "all"] | int:
    """As model.activation_checkpointing spells it."""
    return "none" if every == 0 else "all" if every == 1 else every


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a recipe."""

    zero: Zero
    budget: int
    every: int
    memory: Memory
    seconds: Seconds
    fits: bool


BUDGETS = (1024, 2048, 4096, 8192, 16384)


def candidates(
    shape: Shape, how: Saving, zeros: Sequence[Zero], gpu: Gpu, links: Links, workload: Workload, memory: float,
    *, every: Sequence[int] | None = None,
) -> list[Candidate]:  # fmt: skip
    """Each stage with each token budget and, of the recomputations, the least that fits (all, where none does), or each
    of `every`.

    Args:
        memory: of one GPU, bytes; MARGIN of it stays free.
    """
    found = []
    for zero in zeros:
        last = None
        for budget in BUDGETS:
            work = split(workload, zero.world, budget)
            if work == last:  # as with the smaller budget
                continue
            last = work

            def fits(choice: int, zero: Zero = zero, work: Split = work) -> bool:
                return (
                    peak_memory(shape, how, zero, work.largest, choice).total
                    <= (1 - MARGIN) * memory
                )

            for choice in every or [least_recomputation(shape.layers, fits) or 0]:
                choice = choice if every or fits(choice) else 1
                seconds = step_seconds(
                    shape, how, zero, links, gpu, work, workload.learnt_share, choice
                )
                peak = peak_memory(shape, how, zero, work.largest, choice)
                found.append(Candidate(zero, budget, choice, peak, seconds, fits(choice)))
    return found


def best(found: Sequence[Candidate]) -> Candidate | None:
    """The fastest that fits; of equals (to a hundredth) the one with the smallest memory."""
    fitting = [candidate for candidate in found if candidate.fits]
    if not fitting:
        return None
    fastest = min(candidate.seconds.total for candidate in fitting)
    return min(
        (c for c in fitting if c.seconds.total <= 1.01 * fastest), key=lambda c: c.memory.total
    )
