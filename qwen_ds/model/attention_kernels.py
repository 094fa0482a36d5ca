"""The kernels behind torch's scaled dot product attention: which one runs, and which must not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.attention import SDPBackend

from qwen_ds.model.configuration import QWenConfig

_NAMES = {
    SDPBackend.MATH: "plain matrix products",
    SDPBackend.FLASH_ATTENTION: "FlashAttention",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient attention",
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
}


def without_cudnn_attention() -> None:
    """Keep torch from cuDNN's attention, in the whole process.

    On Hopper and Blackwell torch prefers it, and cuDNN makes a plan for each new (rows, length): 23
    to 37 ms on an H100, up to a second on a B200. In decoding each token has a new length. In
    training even few shapes would take longer to plan than a faster kernel can win back: attention
    is under 2 % of the work at some hundred tokens a row. FlashAttention needs no plan.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def attention_kernels(
    config: QWenConfig,
    shapes: Iterable[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
) -> str:
    """The kernels that compute causal attention of training, in words.

    Args:
        shapes: (rows, length) of micro-batches; torch chooses by the shape.
    """
    if config._attn_implementation == "eager":
        return _NAMES[SDPBackend.MATH]
    heads, width = config.num_attention_heads, config.kv_channels
    found: dict[str, None] = {}
    for rows, length in shapes:
        memory = torch.empty(
            (rows, length, heads, width), dtype=dtype, device=device, requires_grad=True
        )
        q = memory.transpose(1, 2)
        # What F.scaled_dot_product_attention asks: it knows the GPU, the switches and their order.
        choice = torch._fused_sdp_choice(q, q, q, None, config.attn_dropout_prob, True)
        found[_NAMES.get(SDPBackend(choice), "no kernel")] = None
    return " or ".join(found)
