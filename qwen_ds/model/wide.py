"""Matrix products of bf16 tensors in fp32, for CPUs that multiply fp32 faster.

Without a matrix unit (AMX) an x86 CPU gains nothing from bf16 operands, and torch repacks them at every product: a
frozen linear map of 2,048 x 512 x 1,376 took 89 ms in bf16 and 48 ms in fp32 with its operands cast there and back,
causal attention 280 and 116 ms (forward and backward). Tensors, gradients and what is kept for the backward pass stay
bf16; sums are fp32 and rounded once either way, so only their order differs (test_wide_products_are_bf16_products).

Shapes: B rows, H heads, T tokens, W head width, N tokens of any shape, I and O widths of a linear map.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten
# Rows of the head that are cast at a time: 4 MiB of the 7B's.
SLAB_ROWS = 256


@cache
def has_slow_bf16() -> bool:
    """Whether this machine's CPU is an x86 without a matrix unit for bf16."""
    found = torch.cpu.get_capabilities()
    return found.get("architecture") == "x86_64" and not found.get("amx_bf16", False)


def product_dtype(operand: Tensor) -> torch.dtype:
    """The dtype in which matrix products of such tensors are fastest here."""
    slow = operand.dtype == torch.bfloat16 and operand.device.type == "cpu" and has_slow_bf16()
    return torch.float32 if slow else operand.dtype


def linear(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T as fp32 [N, O] without a whole fp32 copy of W; x in `product_dtype`."""
    if x_NI.dtype == weight_OI.dtype:
        return F.linear(x_NI, weight_OI).float()
    out_NO = x_NI.new_empty(x_NI.shape[0], weight_OI.shape[0])
    for out_NS, weight_SI in zip(out_NO.split(SLAB_ROWS, 1), weight_OI.split(SLAB_ROWS), strict=True):
        torch.mm(x_NI, weight_SI.to(x_NI.dtype).t(), out=out_NS)
    return out_NO


def matmul(x_NO: Tensor, weight_OI: Tensor) -> Tensor:
    """x W as `linear`, in x's dtype [N, I]."""
    if x_NO.dtype == weight_OI.dtype:
        return x_NO @ weight_OI
    out_NI = x_NO.new_zeros(x_NO.shape[0], weight_OI.shape[1])
    for x_NS, weight_SI in zip(x_NO.split(SLAB_ROWS, 1), weight_OI.split(SLAB_ROWS), strict=True):
        out_NI.addmm_(x_NS, weight_SI.to(x_NO.dtype))
    return out_NI


class _FrozenLinear(torch.autograd.Function):
    """x W^T + b in fp32 for a W and b without gradients. Only W is kept: fp32 copies live as long as their product."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI)
        bias_O = None if bias_O is None else bias_O.float()
        return F.linear(x_NI.float(), weight_OI.float(), bias_O).to(x_NI.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NO,), (weight_OI,) = grads, ctx.saved_tensors
        return (grad_NO.float() @ weight_OI.float()).to(grad_NO.dtype), None, None


class WideLinear(nn.Linear):
    """A frozen linear map, computed in fp32 and rounded to the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        assert not self.weight.requires_grad
        return _FrozenLinear.apply(x, self.weight, self.bias)


class _CausalAttention(torch.autograd.Function):
    """SDPA's flash kernel for CPUs on fp32 copies; q, k, v and the result are kept as they came."""

    @staticmethod
    def forward(ctx: Any, q_BHTW: Tensor, k_BHTW: Tensor, v_BHTW: Tensor) -> Tensor:
        operands = (t.float() for t in (q_BHTW, k_BHTW, v_BHTW))
        out_BHTW, log_sums = aten._scaled_dot_product_flash_attention_for_cpu(*operands, 0.0, True)
        out_BHTW = out_BHTW.to(q_BHTW.dtype)
        ctx.save_for_backward(q_BHTW, k_BHTW, v_BHTW, out_BHTW, log_sums)
        return out_BHTW

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        *operands, log_sums = ctx.saved_tensors
        dtype = operands[0].dtype
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grads[0].float(), *(t.float() for t in operands), log_sums, 0.0, True
        )
        return tuple(grad.to(dtype) for grad in found)


def causal_attention(q_BHTW: Tensor, k_BHTW: Tensor, v_BHTW: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(W)) v below the diagonal, without dropout: [B, H, T, W] in q's dtype."""
    return _CausalAttention.apply(q_BHTW, k_BHTW, v_BHTW)
