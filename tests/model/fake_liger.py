"""liger-kernel's functions in plain torch, for machines without Triton.

They have the signatures of liger-kernel 0.8.5, its roundings, and what it writes in place: the
norm's backward pass into the gradient that it is given (unless told otherwise), the gate's into the
inputs that it has saved. As Triton does, they write past autograd's version counters. Every call is
named in `calls`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

calls: list[str] = []


class LigerRMSNormFunction(torch.autograd.Function):
    """x / rms(x) * (offset + weight), rounded as `casting_mode` says."""

    @staticmethod
    def forward(
        ctx: Any, X: Tensor, W: Tensor, eps: float, offset: float = 0.0,
        casting_mode: str = "llama", in_place: bool = True, row_mode: bool | None = None,
    ) -> Tensor:  # fmt: skip
        calls.append("norm")
        # Kernels read memory as if it were contiguous, and liger-kernel copies what is not.
        X, W = X.contiguous(), W.contiguous()
        x = X if casting_mode == "none" else X.float()
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(X, W, rstd)
        ctx.offset, ctx.casting_mode, ctx.in_place = offset, casting_mode, in_place
        normed = x * rstd
        normed = normed.to(X.dtype) if casting_mode == "llama" else normed
        return (normed * (W.to(normed.dtype) + offset)).to(X.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        calls.append("norm's gradient")
        (grad,) = grads
        X, W, rstd = ctx.saved_tensors
        grad = grad.contiguous()
        m, normed = grad.float() * (W.float() + ctx.offset), X.float() * rstd.float()
        d_weight = None
        if ctx.needs_input_grad[1]:
            calls.append("norm weight's gradient")
            rounded = normed.to(X.dtype).float() if ctx.casting_mode == "llama" else normed
            d_weight = (grad.float() * rounded).flatten(0, -2).sum(0).to(W.dtype)
        d_x = rstd.float() * (m - normed * (m * normed).mean(-1, keepdim=True))
        out = grad.data if ctx.in_place else torch.empty_like(grad)
        out.copy_(d_x)
        return out, d_weight, None, None, None, None, None


class LigerSiLUMulFunction(torch.autograd.Function):
    """silu(a * gate_multiplier) * b * down_multiplier, silu in fp32 and rounded."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, gate_multiplier: float = 1.0, down_multiplier: float = 1.0
    ) -> Tensor:
        calls.append("gate")
        a, b = a.contiguous(), b.contiguous()
        ctx.save_for_backward(a, b)
        assert gate_multiplier == down_multiplier == 1.0
        return F.silu(a.float()).to(b.dtype) * b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        calls.append("gate's gradient")
        a, b = ctx.saved_tensors
        gate, up, grad = a.float(), b.float(), grads[0].float()
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        a.data.copy_(grad * (silu * (1 - sigmoid) + sigmoid) * up)
        b.data.copy_(grad * silu)
        return a, b, None, None


def install(patched: pytest.MonkeyPatch) -> None:
    """Let `import liger_kernel` find these."""
    calls.clear()
    for name in ("liger_kernel", "liger_kernel.ops"):
        patched.setitem(sys.modules, name, ModuleType(name))
    for function, module in (
        (LigerRMSNormFunction, "liger_kernel.ops.rms_norm"),
        (LigerSiLUMulFunction, "liger_kernel.ops.swiglu"),
    ):
        made = ModuleType(module)
        setattr(made, function.__name__, function)
        patched.setitem(sys.modules, module, made)
