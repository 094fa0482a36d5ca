"""Time of an optimizer step on the busiest rank: the sum of matrix products, attention, passes over
memory, the optimizer, waiting for the CPU, and communication that does not overlap with them."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from qwen_ds.plan import activations, flops
from qwen_ds.plan.activations import FP32, Saving
from qwen_ds.plan.gpus import Gpu
from qwen_ds.plan.shape import Shape
from qwen_ds.plan.step import Split
from qwen_ds.plan.traffic import Links, Zero, traffic

# Shares of a GPU's peak that well-shaped kernels reach: cuBLAS in bf16 (about 790 of an H200's 989
# TFLOP/s), and FlashAttention 2, forward and backward together (Dao 2023, section 4: 50 to 73 % on
# an A100).
PRODUCTS_SHARE, ATTENTION_SHARE = 0.8, 0.5
# A saved number is written and read forward; backward, it and its gradient take one pass each.
PASSES = 4
# PyTorch takes some 7 microseconds of one CPU core to dispatch an operation. A block has about 25
# operations forward, plus 7 for each LoRA branch, and twice as many backward. A GPU that is done
# sooner waits for the CPU.
DISPATCH, BLOCK_OPERATIONS, BRANCH_OPERATIONS = 7e-6, 25, 7


@dataclass(frozen=True, slots=True)
class Cluster:
    """Equal GPUs and their links."""

    gpu: Gpu
    links: Links


@dataclass(frozen=True, slots=True)
class Seconds:
    """Predicted time of one optimizer step."""

    products: float
    attention: float
    passes: float
    optimizer: float
    idle: float  # while the CPU dispatches
    waiting: float  # for communication that nothing hides

    @property
    def total(self) -> float:
        return float(sum(astuple(self)))


@dataclass(frozen=True, slots=True)
class Work:
    """One way to run a recipe: the model, what is trained of it, and how it is spread."""

    shape: Shape
    how: Saving
    zero: Zero


def step_seconds(
    work: Work, cluster: Cluster, split: Split, target_share: float, every: int
) -> Seconds:
    """Predict the time of one optimizer step on the busiest rank; every: see `peak_memory`."""
    shape, how, zero, gpu = work.shape, work.how, work.zero, cluster.gpu
    trained = how.trained_parameters(shape)
    adapter = 0 if how.full else trained
    again = activations.recomputed_blocks(shape.layers, every) / shape.layers
    # 2 N operations a token forward, 2 N for the input's gradient, 2 N for the weights' (flops.py);
    # a recomputed block runs forward once more: 2 N, or a third of attention.
    a_weight = 6 if how.full else 4
    per_token = (a_weight + 2 * again) * shape.block_matrices + (6 + 2 * again) * adapter
    targets = split.padded_tokens * target_share
    operations = split.padded_tokens * per_token + a_weight * targets * shape.head
    products = operations / (PRODUCTS_SHARE * gpu.flops)
    attention = flops.attention_flops(shape, split.squared_tokens) * (1 + again / 3)
    attention /= ATTENTION_SHARE * gpu.flops
    of_block = activations.block_bytes(shape, how, split.largest, first=False)
    saved = shape.layers * of_block * split.padded_tokens / split.largest.tokens
    passes = saved * PASSES * (1 + again / 2) / gpu.bandwidth
    # AdamW reads gradient, parameter and two moments, and writes all but the first.
    optimizer = 7 * FP32 * trained * zero.share(1) / gpu.bandwidth
    dispatched = BLOCK_OPERATIONS + BRANCH_OPERATIONS * len(how.targets)
    dispatching = split.micro_batches * shape.layers * dispatched * (3 + again) * DISPATCH
    busy = products + attention + passes
    idle = max(0.0, dispatching - busy)
    waiting = _waiting(work, cluster.links, split.micro_batches, busy + idle)
    return Seconds(products, attention, passes, optimizer, idle, waiting)


def _waiting(work: Work, links: Links, micro_batches: int, busy: float) -> float:
    """Seconds of communication that does not hide behind `busy` seconds of computation."""
    zero = work.zero
    sent = traffic(work.shape, work.how, zero, micro_batches)
    last = sum(links.seconds(c) for c in sent if c.name == "gather updated parameters")
    beside = sum(links.seconds(c) for c in sent) - last
    # ZeRO-0 and 1 average once a step, so only the last micro-batch can hide it.
    while_busy = busy / (1 if zero.stage > 1 else micro_batches)
    hidden = min(beside, while_busy) if zero.overlap else 0.0
    return last + beside - hidden
