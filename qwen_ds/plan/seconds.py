"""Time of an optimizer step on the busiest rank: the sum of matrix products, attention, passes over
memory (operations.py), the optimizer, waiting for the CPU, and communication that does not overlap
with them."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from qwen_ds.plan import activations, flops
from qwen_ds.plan.activations import FP32, Saving
from qwen_ds.plan.gpus import Gpu
from qwen_ds.plan.operations import block_bytes_moved
from qwen_ds.plan.shape import Shape
from qwen_ds.plan.step import Split
from qwen_ds.plan.traffic import Links, Zero, traffic

# Shares of a GPU's peak that well-shaped kernels reach: cuBLAS in bf16 (about 790 of an H200's 989
# TFLOP/s), and FlashAttention 2, forward and backward together (Dao 2023, section 4: 50 to 73 % on
# an A100).
PRODUCTS_SHARE, ATTENTION_SHARE = 0.8, 0.5
# Seconds in which a core of a server's CPU launches a block's operations, forward and backward: 30
# ms for the 7B's 32 blocks, 85 ms under ZeRO-3, whose hooks gather and release each block. (Where
# earlier code took 49 and 262, times the shares of that in tests/benchmarks/RESULTS.md: 27 and 84.)
# A GPU that is done sooner waits for the CPU.
LAUNCHES, LAUNCHES_ZERO_3 = 30e-3 / 32, 85e-3 / 32


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
    idle: float  # while the CPU launches
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
    compiled: bool = False  # whether the blocks are


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
    of_block = block_bytes_moved(shape, how, compiled=work.compiled, again=again)
    # Each product of a micro-batch begins with reading its weights.
    of_weights = how.b * shape.block_matrices * (2 + how.full + again)
    moved = shape.layers * of_block * split.padded_tokens + of_weights * split.micro_batches
    passes = moved / gpu.bandwidth
    # AdamW reads gradient, parameter and two moments, and writes all but the first.
    optimizer = 7 * FP32 * trained * zero.share(1) / gpu.bandwidth
    busy = products + attention + passes
    idle = max(0.0, launching_seconds(work, split, every) - busy)
    waiting = _waiting(work, cluster.links, split.micro_batches, busy + idle)
    return Seconds(products, attention, passes, optimizer, idle, waiting)


def launching_seconds(work: Work, split: Split, every: int) -> float:
    """Time in which the CPU launches the operations of a step, mostly while the GPU computes."""
    layers = work.shape.layers
    again = activations.recomputed_blocks(layers, every) / layers
    of_block = LAUNCHES_ZERO_3 if work.zero.stage == 3 else LAUNCHES
    return split.micro_batches * layers * of_block * (1 + again / 3)


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
