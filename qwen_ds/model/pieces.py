"""The memory-bound pieces of a block, each a function of its own, and who computes them.

Between the products of a block there is little arithmetic: its time is that of the bytes that are
read and written. Each piece has one formula, which a compiled block traces and fuses with what is
around it. Elsewhere a block's `Pieces` fill it:

- EAGER: torch's own operations, chosen for the bytes that they move and save;
- `compiled_pieces`: the formulas, each compiled by itself;
- `liger.liger_pieces`: liger-kernel's, on a GPU where nothing is compiled.

Shapes: B rows, T tokens, H heads, W head width, F = W / 2 rotary frequencies, I inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen_ds.model.rotary import apply_rotary

QKV = tuple[Tensor, Tensor, Tensor]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x), computed in fp32 and rounded to x's dtype, then times the weight in it.

    The official code rounds before the product with the weight; given the weight, rms_norm would
    round only after it.
    """
    return F.rms_norm(x, (x.shape[-1],), None, eps) * weight


def gated(up: Tensor, gate: Tensor) -> Tensor:
    """up * silu(gate), [..., I]: silu in fp32, rounded to the dtype before the product."""
    return up * F.silu(gate)


def rotated(qkv: Tensor, cos: Tensor, sin: Tensor) -> QKV:
    """q and k of [B, T, 3, H, W] turned by angles [B or 1, T, 1, 1, F], and v as it is."""
    qk, v = qkv.split((2, 1), dim=2)  # views, whose gradients are joined by one copy
    q, k = apply_rotary(qk, cos, sin).unbind(2)
    return q, k, v.squeeze(2)


class _Rotated(torch.autograd.Function):
    """`rotated` in place: q, k and v stay views of the fused projection, which no product saves."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> QKV:
        ctx.save_for_backward(cos, sin)
        qk = qkv[:, :, :2]
        turn(qk, cos, sin, out=qk)
        q, k, v = qkv.unbind(2)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradients of all three joined, q's and k's turned back."""
        cos, sin = ctx.saved_tensors
        joined = torch.stack(grads, dim=2)
        qk = joined[:, :, :2]
        turn(qk, cos, -sin, out=qk)
        return joined, None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """`apply_rotary` into `out`, which may be x itself."""
    if x.device.type == "cpu":
        # A CPU casts into a tensor of its own whatever the operation, and is slow with an `out`
        # that is not contiguous.
        out.copy_(apply_rotary(x, cos, sin))
    else:
        turn_by_parts(x, cos, sin, out)


def turn_by_parts(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Four operations that cast as they read and write: no copy of x in fp32 is made."""
    (first, second), (out_first, out_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    # All that is made from the first half exists before `out` takes its place.
    by_cos, by_sin = first * cos, first * sin
    torch.addcmul(by_cos, second, sin, value=-1, out=out_first)
    torch.addcmul(by_sin, second, cos, out=out_second)


def rotated_in_place(qkv: Tensor, cos: Tensor, sin: Tensor) -> QKV:
    """`rotated`, where gradients are recorded in the memory of qkv, which the caller gives up."""
    if not (qkv.requires_grad and torch.is_grad_enabled()):
        return rotated(qkv, cos, sin)
    q, k, v = _Rotated.apply(qkv, cos, sin)
    return q, k, v


@dataclass(frozen=True, slots=True)
class Pieces:
    """A filling for each piece; arguments and results are those of the functions above."""

    norm: Callable[[Tensor, Tensor, float], Tensor]
    gated: Callable[[Tensor, Tensor], Tensor]
    rotated: Callable[[Tensor, Tensor, Tensor], QKV]

    def here(self) -> Pieces:
        """These pieces, or the formulas where a compiler is tracing."""
        return _FORMULAS if torch.compiler.is_compiling() else self


_FORMULAS = Pieces(norm, gated, rotated)
EAGER = Pieces(norm, gated, rotated_in_place)


def compiled_pieces() -> Pieces:
    """The formulas, each compiled at its first use: where blocks are not, as under ZeRO-3, whose
    hooks gather the weights inside them."""
    return Pieces(
        torch.compile(norm, dynamic=True),
        torch.compile(gated, dynamic=True),
        torch.compile(rotated, dynamic=True),
    )


class Pieced(nn.Module):
    """A module that computes some of the pieces."""

    pieces: Pieces = EAGER


def fill(model: nn.Module, pieces: Pieces) -> None:
    """Let every block of `model` compute its pieces so."""
    for module in model.modules():
        if isinstance(module, Pieced):
            module.pieces = pieces
