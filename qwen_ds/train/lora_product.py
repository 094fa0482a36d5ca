"""Linear maps of one x with their LoRA branches as one autograd function.

    y = x W^T + bias + scale * drop(x) A^T B^T, for each of n maps

The branch is added into the base's product, and its gradients into the base's, by the products
themselves: nothing as wide as x or y is written only to be read again. The maps share drop(x), and
their A lie below each other in one matrix. A and B are fp32 parameters that are used in x's dtype;
their casts are made once a step.

Shapes: N tokens, I input width, O output width, R rank, S = n R.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook


class LoraMap(NamedTuple):
    """A frozen linear map and the matrices of its branch."""

    base: nn.Linear
    a_RI: Tensor
    b_OR: Tensor


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
    """Parameters below each other in another dtype, copied when one may have changed since the last
    copy."""

    def __init__(self) -> None:
        self._made_of: tuple[object, ...] = ()
        self._copy = torch.empty(0)

    def of(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The rows of all `parameters` in `dtype`; a single one that has it is not copied. No
        gradient flows through them."""
        first, *others = parameters
        if not others and first.dtype == dtype:
            return first.detach()
        versions = tuple((id(each), each._version) for each in parameters)
        now = _Updates.count, versions, dtype, first.device
        if self._made_of != now:
            casts = [each.detach().to(dtype) for each in parameters]
            self._copy, self._made_of = torch.cat(casts) if others else casts[0], now
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


def lora_formula(x: Tensor, maps: Sequence[LoraMap], scale: float, p: float) -> list[Tensor]:
    """The same for a compiler, which makes the backward pass and fuses what it can."""
    dropped = x
    if p and x.device.type == "cpu":
        dropped, _, share = drop(x, p)
        scale /= share
    elif p:
        dropped = F.dropout(x, p)
    a_SI = torch.cat([each.a_RI.to(x.dtype) for each in maps])
    # The scale multiplies the r-wide middle and not the wide result: one pass less over memory.
    middles = (F.linear(dropped, a_SI) * scale).chunk(len(maps), -1)
    return [
        each.base(x) + F.linear(middle, each.b_OR.to(x.dtype))
        for each, middle in zip(maps, middles, strict=True)
    ]


def lora_products(
    x: Tensor,
    maps: Sequence[LoraMap],
    casts: tuple[Tensor, Sequence[Tensor]],
    scale: float,
    p: float,
) -> tuple[Tensor, ...]:
    """y [..., O] of each map for x [..., I]; the bases get no gradient.

    Args:
        casts: in x's dtype, the A of all maps below each other [S, I], and the B of each.
    """
    tensors = [t for base, a, b in maps for t in (base.weight, base.bias, a, b)]
    outs: tuple[Tensor, ...] = _LoraProducts.apply(x, casts, scale, p, *tensors)
    return outs


class _LoraProducts(torch.autograd.Function):
    """apply(x, casts, scale, p, weight [O, I], bias [O] or None, A and B of each map)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        casts: tuple[Tensor, Sequence[Tensor]],
        scale: float,
        p: float,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        x_NI, (a_SI, bs) = x.reshape(-1, x.shape[-1]), casts
        weights, biases = tensors[::4], tensors[1::4]
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
        middle_NS = _scaled(dropped_NI, a_SI.t(), scale_middle)
        outs = []
        middles = middle_NS.chunk(len(bs), 1)
        for weight_OI, bias_O, b_OR, middle_NR in zip(weights, biases, bs, middles, strict=True):
            w_IO = weight_OI.t()
            y_NO = x_NI @ w_IO if bias_O is None else torch.addmm(bias_O, x_NI, w_IO)
            outs.append(y_NO.addmm_(middle_NR, b_OR.t()).view(*x.shape[:-1], -1))
        of_x = (a_SI, kept_NI, *weights) if ctx.needs_input_grad[0] else ()
        ctx.save_for_backward(dropped_NI, middle_NS, *bs, *of_x)
        ctx.scale, ctx.up_x = scale_middle, up * scale / scale_middle
        ctx.x_shape, ctx.dtypes = x.shape, (tensors[2].dtype, tensors[3].dtype)
        ctx.maps = len(bs)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dropped_NI, middle_NS, *others = ctx.saved_tensors
        bs, of_x = others[: ctx.maps], others[ctx.maps :]
        grads_NO = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        middles = middle_NS.chunk(ctx.maps, 1)
        grads_b = [
            _product(grad_NO.t(), middle_NR, ctx.dtypes[1])
            for grad_NO, middle_NR in zip(grads_NO, middles, strict=True)
        ]
        thin = [_scaled(grad_NO, b, ctx.scale) for grad_NO, b in zip(grads_NO, bs, strict=True)]
        grad_NS = torch.cat(thin, 1) if len(thin) > 1 else thin[0]
        grads_a = _product(grad_NS.t(), dropped_NI, ctx.dtypes[0]).chunk(ctx.maps)
        grad_x = None
        if ctx.needs_input_grad[0]:
            a_SI, kept_NI, *weights = of_x
            grad_x = grads_NO[0] @ weights[0]
            for grad_NO, weight_OI in zip(grads_NO[1:], weights[1:], strict=True):
                grad_x.addmm_(grad_NO, weight_OI)
            if kept_NI is None:
                grad_x.addmm_(grad_NS, a_SI)
            else:
                grad_x.addcmul_(grad_NS @ a_SI, kept_NI, value=ctx.up_x)
            grad_x = grad_x.view(ctx.x_shape)
        of_maps = (g for pair in zip(grads_a, grads_b, strict=True) for g in (None, None, *pair))
        return grad_x, None, None, None, *of_maps


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left right, by one product."""
    unread = left.new_empty(()).expand(left.shape[0], right.shape[1])  # beta is 0
    return torch.addmm(unread, left, right, beta=0, alpha=scale)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left right in `dtype`, not rounded in between where the device can do without."""
    if dtype == torch.float32 != left.dtype and left.device.type != "cpu":
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)
