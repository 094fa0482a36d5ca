"""Floating point operations that the model needs for an optimizer step, and the share of the
hardware's peak that they make (MFU).

Only matrix products count, a multiply-add as two operations: of real tokens without padding,
without recomputation, and with attention below the diagonal only. A product with N weights costs 2N
a token forward, 2N for the gradient of its input and 2N for the gradient of its weights (Kaplan et
al. 2020, appendix B; Chowdhery et al. 2022, appendix B). Hence

    full training   6 N a token,
    LoRA            4 N a token, since frozen weights get no gradient; the adapter's own products,
                    well under 1 % of a 7B's, are left out,

where N is the weights of the blocks for every real token, and the head's only for target tokens,
since no others get logits. For a row of T tokens attention costs 4 D T^2 / 2 in each block forward
(scores, and their product with the values, halved by causality), and twice that backward, however
much is trained: 6 D T^2 L in all.
"""

from __future__ import annotations

from typing import Literal

from qwen_ds.plan.gpus import Gpu
from qwen_ds.plan.shape import Shape


def step_flops(
    shape: Shape,
    *,
    method: Literal["lora", "full"],
    tokens: float,
    targets: float,
    squared_tokens: float,
) -> float:
    """Operations that the rows of a step need, over all ranks, given their real tokens, their
    target tokens and the sum of their squared lengths."""
    a_weight = 4 if method == "lora" else 6
    products = a_weight * (shape.block_matrices * tokens + shape.head * targets)
    return products + attention_flops(shape, squared_tokens)


def attention_flops(shape: Shape, squared_tokens: float) -> float:
    """Operations of attention, forward and backward: 6 D T^2 L, T^2 summed over the rows."""
    return 6.0 * shape.hidden * shape.layers * squared_tokens


def utilisation(flops: float, seconds: float, ranks: int, gpu: Gpu) -> float:
    """Model FLOP utilisation (Chowdhery et al. 2022), 0 to 1: operations needed over operations
    that the GPUs could have done."""
    return flops / (seconds * ranks * gpu.flops)
