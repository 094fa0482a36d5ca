"""A linear map with its LoRA branch as one autograd function.

    y = x W^T + bias + scale * drop(x) A^T B^T

The branch is added into the base's product, and its gradients into the base's, by the products
themselves: nothing as wide as x or y is written only to be read again. A and B are fp32 parameters
that are used in x's dtype; their casts are made once a step.

Shapes: N tokens, I input width, O output width, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook


class _Updates:
    """The number of times that parameters may have changed where autograd does not count it."""

    count = 0

    @classmethod
    def note(cls, *_: object) -> None:
        cls.count += 1


# DeepSpeed writes parameters through `.data`, which their version counters miss: after a step of
# the optimizer, and when a state is restored (qwen_ds/train/engine/state.py).
values_changed = _Updates.note
register_optimizer_step_post_hook(values_changed)


class Cast:
    """A parameter in another dtype, copied when it may have changed since the last copy."""

    def __init__(self) -> None:
        self._made_at: tuple[int, int, torch.dtype, torch.device] | None = None
        self._copy = torch.empty(0)

    def of(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """`parameter`, or its copy in `dtype`. No gradient flows through it."""
        if parameter.dtype == dtype:
            return parameter.detach()
        now = _Updates.count, parameter._version, dtype, parameter.device
        if self._made_at != now:
            self._copy, self._made_at = parameter.detach().to(dtype), now
        return self._copy


def drop(x: Tensor, p: float) -> tuple[Tensor, Tensor, float]:
    """Dropout for CPUs: x with zeros, what is kept (bool), and the share that is, by which the
    caller divides.

    A CPU draws random numbers one after another, so one draw of 64 bits decides on eight elements,
    and p is rounded to a multiple of 2^-8: 2048 x 512 elements take 2 ms, with torch's dropout 16.
    Where that is off by more than 2 % of p, or of 1 - p, a draw decides on four, p being a multiple
    of 2^-16; a compiler makes slower code of it, since inductor has no vectors of int16.
    """
    bits, dtype = 8, torch.uint8
    dropped, lowest = round(p * 2**bits), 0
    if abs(dropped / 2**bits - p) > 0.02 * min(p, 1 - p):
        bits, dtype = 16, torch.int16
        dropped, lowest = round(p * 2**bits), -(2**15)
    draws = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() * bits // 64),), dtype=torch.int64)
    drawn = draws.view(dtype)[: x.numel()].view(x.shape)
    if torch.compiler.is_compiling():
        drawn = drawn.float()  # inductor is slow to make masks of floats of those of bytes
    keep = drawn >= dropped + lowest
    return torch.where(keep, x, 0.0), keep, 1 - dropped / 2**bits


def lora_formula(
    x: Tensor, base: nn.Linear, a_RI: Tensor, b_OR: Tensor, scale: float, p: float
) -> Tensor:
    """The same for a compiler, which makes the backward pass and fuses what it can."""
    dropped = x
    if p and x.device.type == "cpu":
        dropped, _, share = drop(x, p)
        scale /= share
    elif p:
        dropped = F.dropout(x, p)
    # The scale multiplies the r-wide middle and not the wide result: one pass less over memory.
    middle = F.linear(dropped, a_RI.to(x.dtype)) * scale
    return base(x) + F.linear(middle, b_OR.to(x.dtype))


class LoraProduct(torch.autograd.Function):
    """apply(x [..., I], weight [O, I], bias [O] or None, A [R, I], B [O, R], casts of A and B,
    scale, p) -> [..., O]. The base gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        casts: tuple[Tensor, Tensor],
        scale: float,
        p: float,
    ) -> Tensor:
        x_NI, (a, b) = x.reshape(-1, x.shape[-1]), casts
        # up: what is kept is multiplied by it. A CPU does so in the r-wide middle.
        kept_NI: Tensor | None = None
        dropped_NI, up, scale_middle = x_NI, 1.0, scale
        if p and x.device.type == "cpu":
            dropped_NI, kept_NI, share = drop(x_NI, p)
            up = 1 / share
            scale_middle = scale * up
        elif p:
            dropped_NI, kept_NI = torch.native_dropout(x_NI, p, True)
            up = 1 / (1 - p)
        w_IO = weight_OI.t()
        y_NO = x_NI @ w_IO if bias_O is None else torch.addmm(bias_O, x_NI, w_IO)
        middle_NR = _scaled(dropped_NI, a.t(), scale_middle)
        y_NO.addmm_(middle_NR, b.t())
        of_x = (weight_OI, a, kept_NI) if ctx.needs_input_grad[0] else (None, None, None)
        ctx.save_for_backward(dropped_NI, middle_NR, b, *of_x)
        ctx.scale, ctx.up_x = scale_middle, up * scale / scale_middle
        ctx.x_shape, ctx.dtypes = x.shape, (a_RI.dtype, b_OR.dtype)
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dropped_NI, middle_NR, b, weight_OI, a, kept_NI = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_NR = _scaled(grad_NO, b, ctx.scale)
        grad_a = _product(grad_NR.t(), dropped_NI, ctx.dtypes[0])
        grad_b = _product(grad_NO.t(), middle_NR, ctx.dtypes[1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_NO @ weight_OI
            if kept_NI is None:
                grad_x.addmm_(grad_NR, a)
            else:
                grad_x.addcmul_(grad_NR @ a, kept_NI, value=ctx.up_x)
            grad_x = grad_x.view(ctx.x_shape)
        return grad_x, None, None, grad_a, grad_b, None, None, None


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left right, by one product."""
    unread = left.new_empty(()).expand(left.shape[0], right.shape[1])  # beta is 0
    return torch.addmm(unread, left, right, beta=0, alpha=scale)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left right in `dtype`, not rounded in between where the device can do without."""
    if dtype == torch.float32 != left.dtype and left.device.type != "cpu":
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)
