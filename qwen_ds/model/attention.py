"""Attention of the original Qwen.

Shapes: B rows, T new tokens, D hidden, H heads, W head width; q, k and v are [B, H, T, W].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

from qwen_ds.decode.kv import PackedCache
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.pieces import Pieced
from qwen_ds.model.plain_attention import attend, is_for
from qwen_ds.model.token_grid import with_zeros, without_zeros


class BiasedLinear(nn.Linear):
    """A linear layer that adds its bias before the product is rounded, whoever computes it.

    Under ZeRO-3 DeepSpeed's linear function takes the place of torch's. It does so, too, for inputs
    of two dimensions, but for others it rounds the product first
    (test_the_first_loss_of_a_bf16_base_is_the_same_at_every_stage).
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(0, -2)).unflatten(0, input.shape[:-1])


class ResidualLinear(nn.Linear):
    """A Linear that writes into the residual stream; a class of its own, since its fresh weights
    are smaller (`_init_weights`)."""


class QWenAttention(Pieced):
    """Causal self-attention. `c_attn` gives q, k and v side by side and always has a bias."""

    def __init__(self, config: QWenConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.kv_channels
        self.dropout = config.attn_dropout_prob
        width = config.hidden_size
        self.c_attn = BiasedLinear(width, 3 * width)
        self.c_proj = ResidualLinear(width, width, bias=not config.no_bias)

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        logn: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
        cache: Cache | PackedCache | None,
    ) -> Tensor:
        qkv = without_zeros(self.c_attn(x_BTD), cos.shape[1])
        rows, length, width = *qkv.shape[:2], x_BTD.shape[2]
        qkv = qkv.view(rows, length, 3, self.num_heads, self.head_dim)
        q, k, v = self.pieces.here().rotated(qkv, cos, sin)
        if logn is not None:
            q = q * logn
        if isinstance(cache, PackedCache):
            out_NHW = cache.attend(q[0], k[0], v[0], self.layer_idx)
            return self.c_proj(out_NHW.reshape(rows, length, width))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        dropout = self.dropout if self.training else 0.0
        if self.config._attn_implementation == "eager":
            out = eager_attention(q, k, v, mask, dropout)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        out_BTD = out.transpose(1, 2).reshape(rows, length, width)
        return self.c_proj(with_zeros(out_BTD, x_BTD.shape[1]))


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attention as plain matrix products, softmax in fp32, for machines where those beat SDPA's
    kernels."""
    if is_for(q, k, mask, dropout):
        return attend(q, k, v, mask)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    probs = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return (F.dropout(probs, dropout) if dropout else probs) @ v
