"""Rotary embedding, dynamic NTK and LogN of Qwen v1, as pure functions of positions and lengths.

Nothing here lives in a module: transformers re-initialises every module whose non-persistent
buffers are missing from the checkpoint, so tables kept as buffers would silently ruin weights on
loading (test_loading_changes_no_weight).

Shapes: B rows, T tokens, H heads, D head width, F = D / 2 rotary frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MAX_DOUBLINGS = 24  # S * 2^24 tokens: longer than any context


def ntk_alpha(lens: Tensor, seq_length: int) -> Tensor:
    """Alpha of dynamic NTK for rows of L tokens: max(2^ceil(log2(L/S) + 1) - 1, 1), S = seq_length.

    Computed in integers as 2^(k+1) - 1, where k doublings of S are needed to hold L. Unlike the
    logarithm this is exact at every power of two, and it needs no accelerator synchronisation.

    `lens` is int64 of any shape; so is the result: 1 up to S, 3 up to 2S, 7 up to 4S ...
    """
    limits = seq_length * 2 ** torch.arange(_MAX_DOUBLINGS, device=lens.device)
    doublings = (lens.unsqueeze(-1) > limits).sum(-1)
    return 2 ** (doublings + 1) - 1


def rotary_tables(
    position_ids_BT: Tensor, head_dim: int, base: float, alpha_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles, position * b^(-2i/D), b = base * alpha^(D/(D-2)).

    The half-split rotation uses each angle for dimension i and for i + D/2, so only D/2 are made.

    Args:
        position_ids_BT: int64 [B or 1, T].
        alpha_BT: int64 [B, 1 or T], alpha of dynamic NTK per row, or per token; None is 1 for all.
    Returns:
        cos and sin, fp32 [B or 1, T, F].
    """
    dimensions_F = torch.arange(0, head_dim, 2, device=position_ids_BT.device, dtype=torch.float32)
    exponents_F = dimensions_F / head_dim
    if alpha_BT is None:
        inv_freq = 1.0 / torch.pow(float(base), exponents_F)
    else:
        # The scaled base is a float64 in the official code and rounded once, on entering the power.
        base_BT = float(base) * alpha_BT.double() ** (head_dim / (head_dim - 2))
        inv_freq = 1.0 / torch.pow(base_BT.float().unsqueeze(-1), exponents_F)  # [B, 1 or T, F]
    angles = position_ids_BT.float().unsqueeze(-1) * inv_freq
    return angles.cos(), angles.sin()


def logn_factors(position_ids_BT: Tensor, seq_length: int) -> Tensor:
    """LogN: max(1, log_S(p + 1)) for a query at 0-based position p, S = seq_length.

    Computed in float64 and rounded to fp32; the model rounds it again to its own dtype, as the
    official code does with its table.
    """
    return (torch.log(position_ids_BT.double() + 1) / math.log(seq_length)).clamp(min=1.0).float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of x [..., D] by the angles [..., D / 2], in fp32, rounded once.

    x becomes fp32 before it is used twice, so that its gradient is also summed in fp32 and rounded
    once.
    """
    first, second = x.float().chunk(2, dim=-1)
    halves = first * cos - second * sin, second * cos + first * sin
    if torch.compiler.is_compiling():  # which would write the joined halves in fp32 and read them
        return torch.cat([half.to(x.dtype) for half in halves], dim=-1)
    return torch.cat(halves, dim=-1).to(x.dtype)
