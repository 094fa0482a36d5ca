"""Floating point operations of an optimizer step: what the model needs, and the share of the
hardware that this is.

Counted are matrix products, a multiplication with its addition as two operations, as the model
needs them: real tokens without padding, nothing recomputed, attention only below the diagonal. A
product with N weights costs 2N a token forward, 2N for the gradient of its input and 2N for the
gradient of the weights (Kaplan et al. 2020, appendix B; Chowdhery et al. 2022, appendix B). Hence

    full training   6 N a token,
    LoRA            4 N a token: frozen weights have no gradient of their own; the adapter's own
        products (well under
                    1 % of a 7B's) are not counted,

with N_blocks for every real token and N_head only for the learnt ones, where alone logits exist.
Attention costs 4 D T^2 / 2 for a row of T tokens and a block forward (scores, and their product
with the values, halved by causality),
and twice that backward, however much is trained: 6 D T^2 L.
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
    """Operations that the rows of a step need, over all ranks.

    Args:
        tokens: real tokens.
        targets: learnt tokens.
        squared_tokens: the sum over the rows of their squared lengths.
    """
    a_weight = 4 if method == "lora" else 6
    products = a_weight * (shape.block_matrices * tokens + shape.head * targets)
    return products + attention_flops(shape, squared_tokens)


def attention_flops(shape: Shape, squared_tokens: float) -> float:
    """Forward and backward attention of rows whose squared lengths add up to this: 6 D T^2 L."""
    return 6.0 * shape.hidden * shape.layers * squared_tokens


def utilisation(flops: float, seconds: float, ranks: int, gpu: Gpu) -> float:
    """Model FLOP utilisation (Chowdhery et al. 2022), 0 to 1: needed operations over those that the
    GPUs could do."""
    return flops / (seconds * ranks * gpu.flops)
