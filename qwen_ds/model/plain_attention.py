"""Plain attention of compiled blocks on a CPU: its products and softmax, forward and back, as
operations that inductor calls as they are.

Inductor's own softmax makes three passes over fp32 scores, where torch's kernel makes one, and its
backward pass computes every exp a second time: 4 rows of 160 tokens with 8 heads took 2.6 ms
forward and 2.4 ms back, with torch's kernels 0.65 and 0.3.

Shapes: B rows, T queries, K keys, H heads, W head width, N = B * H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_for(q: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Whether `attend` is the faster way: in a compiled block on a CPU, with one mask for all rows,
    and nothing dropped."""
    if not torch.compiler.is_compiling() or q.device.type != "cpu" or dropout:
        return False
    return mask is None or (mask.dtype == torch.bool and mask.shape[:-2].numel() == 1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(W)) v [B, H, T, W], the softmax in fp32 and rounded to the dtype.

    Args:
        q, k, v: [B, H, T or K, W].
        mask: bool [1, 1, T, K], True for the keys that a query sees, one at least.
    """
    # Products need heads apart. Here the compiler makes these copies, with the rotation's kernel.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, _ = torch.ops.qwen_ds.plain_attention(q, k, v, mask)
    return out


@torch.library.custom_op("qwen_ds::plain_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result, and the probabilities [N, T, K] for the backward pass."""
    q_NTW, k_NKW, v_NKW = (x.flatten(0, 1) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    if mask is None:
        scores_NTK = _scaled(q_NTW, k_NKW.transpose(1, 2), scale)
    else:
        hidden_1TK = ~mask.view(1, *mask.shape[-2:])
        bias_1TK = hidden_1TK.to(q.dtype).mul_(torch.finfo(q.dtype).min)
        scores_NTK = torch.baddbmm(bias_1TK, q_NTW, k_NKW.transpose(1, 2), alpha=scale)
    probs_NTK = scores_NTK.softmax(-1)  # fp32 inside, whatever the dtype
    return (probs_NTK @ v_NKW).view(q.shape), probs_NTK


@torch.library.custom_op("qwen_ds::plain_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, probs_NTK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_NTW, q_NTW, k_NKW, v_NKW = (x.flatten(0, 1) for x in (grad, q, k, v))
    grad_v = probs_NTK.transpose(1, 2) @ grad_NTW
    grad_NTK = grad_NTW @ v_NKW.transpose(1, 2)
    grad_NTK = torch._softmax_backward_data(grad_NTK, probs_NTK, -1, probs_NTK.dtype)
    scale = q.shape[-1] ** -0.5
    grad_q = _scaled(grad_NTK, k_NKW, scale)
    grad_k = _scaled(grad_NTK.transpose(1, 2), q_NTW, scale)
    return grad_q.view(q.shape), grad_k.view(k.shape), grad_v.view(v.shape)


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left right, scaled before it is rounded."""
    unread = left.new_empty(()).expand(left.shape[0], left.shape[1], right.shape[2])  # beta is 0
    return torch.baddbmm(unread, left, right, beta=0, alpha=scale)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        q.new_empty(q.shape[0] * q.shape[1], q.shape[2], k.shape[2]),
    )


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, probs_NTK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    of_q_k_v = torch.ops.qwen_ds.plain_attention_backward(grad.contiguous(), *ctx.saved_tensors)
    return *of_q_k_v, None


_forward.register_autograd(_gradients, setup_context=_save)
