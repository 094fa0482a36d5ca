"""Plain attention of compiled blocks on a CPU: its products and softmax, forward and back, as
operations that inductor calls as they are.

Inductor's own softmax makes three passes over fp32 scores, where torch's kernel makes one, and its
backward pass computes every exp a second time: 4 rows of 160 tokens with 8 heads took 2.6 ms
forward and 2.4 ms back, with torch's kernels 0.65 and 0.3.

Rows may also lie after each other in one: the mask is as long as a row.

Shapes: B rows, M tokens of a row or of R rows after each other, T tokens of a row, H heads, W head
width, N = B * H * R.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_for(q: Tensor, k: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Whether `attend` is the faster way: in a compiled block on a CPU, where as many queries meet
    as many keys under one mask for all rows, and nothing is dropped. Of rows that lie after each
    other it is the only one, compiled or not."""
    if not torch.compiler.is_compiling():
        return mask is not None and mask.shape[-1] < k.shape[2]
    if q.device.type != "cpu" or dropout:
        return False
    if mask is None:
        return q.shape[2] == k.shape[2]
    is_square = mask.shape[-1] == mask.shape[-2] and mask.shape[:-2].numel() == 1
    return mask.dtype == torch.bool and is_square


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(W)) v [B, H, M, W], the softmax in fp32 and rounded to the dtype.

    Args:
        q, k, v: [B, H, M, W].
        mask: bool [1, 1, T, T], True for the keys that a query sees, one at least; None: all M.
    """
    # Products need heads apart. Here the compiler makes these copies, with the rotation's kernel.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, _ = torch.ops.qwen_ds.plain_attention(q, k, v, mask, q.requires_grad)
    return out


# The shapes of scores for which oneDNN has compiled all products.
_met: set[torch.Size] = set()


@torch.library.custom_op("qwen_ds::plain_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, trains: bool
) -> tuple[Tensor, Tensor]:
    """The result, and the probabilities [N, T, T] for the backward pass, which follows where it
    `trains`."""
    length = q.shape[2] if mask is None else mask.shape[-1]
    q_NTW, k_NTW, v_NTW = (_of_rows(x, length) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    if mask is None:
        scores_NTT = _scaled(q_NTW, k_NTW.transpose(1, 2), scale)
    else:
        hidden_1TT = ~mask.view(1, length, length)
        bias_1TT = hidden_1TT.to(q.dtype).mul_(torch.finfo(q.dtype).min)
        scores_NTT = torch.baddbmm(bias_1TT, q_NTW, k_NTW.transpose(1, 2), alpha=scale)
    probs_NTT = scores_NTT.softmax(-1)  # fp32 inside, whatever the dtype
    out = (probs_NTT @ v_NTW).view(q.shape)
    if trains and probs_NTT.shape not in _met:
        # The products of the backward pass stay in memory: see qwen_ds/train/cpu_shapes.py.
        _met.add(probs_NTT.shape)
        _backward(out, q, k, v, probs_NTT)
    return out, probs_NTT


@torch.library.custom_op("qwen_ds::plain_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, probs_NTT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_NTW, q_NTW, k_NTW, v_NTW = (_of_rows(x, probs_NTT.shape[1]) for x in (grad, q, k, v))
    grad_v = probs_NTT.transpose(1, 2) @ grad_NTW
    # Scaled here, so that the two products below are those that give `out` and grad_v, for oneDNN.
    grad_NTT = _scaled(grad_NTW, v_NTW.transpose(1, 2), q.shape[-1] ** -0.5)
    grad_NTT = torch._softmax_backward_data(grad_NTT, probs_NTT, -1, probs_NTT.dtype)
    grad_q = grad_NTT @ k_NTW
    grad_k = grad_NTT.transpose(1, 2) @ q_NTW
    return grad_q.view(q.shape), grad_k.view(k.shape), grad_v.view(v.shape)


def _of_rows(x: Tensor, length: int) -> Tensor:
    return x.reshape(-1, length, x.shape[-1])


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left right, scaled before it is rounded."""
    unread = left.new_empty(()).expand(left.shape[0], left.shape[1], right.shape[2])  # beta is 0
    return torch.baddbmm(unread, left, right, beta=0, alpha=scale)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, trains: bool) -> tuple[Tensor, Tensor]:
    length = q.shape[2] if mask is None else mask.shape[-1]
    rows = q.shape[0] * q.shape[1] * (q.shape[2] // length)
    return q.new_empty(q.shape), q.new_empty(rows, length, length)


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, probs_NTT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    of_q_k_v = torch.ops.qwen_ds.plain_attention_backward(grad.contiguous(), *ctx.saved_tensors)
    return *of_q_k_v, None, None


_forward.register_autograd(_gradients, setup_context=_save)
