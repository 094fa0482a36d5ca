"""The keys that a query may see, and when attention needs no mask for that.

Shapes: B rows, T new tokens (queries), K keys (cached and new).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Visibility:
    """The keys that each query sees, and the padding in front of the rows."""

    mask: Tensor | None  # [B or 1, 1, T, K], bool (True: visible) or additive; None: not needed
    is_causal: bool  # SDPA's own path; only ever True where T == K, since SDPA aligns it top-left
    left_pads_B: Tensor | None = None  # int64: padding in front of each row; None: no row has any

    def positions(self, num_queries: int, past_len: int | Tensor, device: torch.device) -> Tensor:
        """int64 [B or 1, T]: indices of the new tokens in their rows, not counting left padding."""
        index_1T = (torch.arange(num_queries, device=device) + past_len).unsqueeze(0)
        if self.left_pads_B is None:
            return index_1T
        return (index_1T - self.left_pads_B.unsqueeze(-1)).clamp(min=0)


def visibility(
    attention_mask: Tensor | None,
    num_queries: int,
    num_keys: int,
    past_len: int | Tensor,
    device: torch.device,
    causal_path: bool = True,
) -> Visibility:
    """Decide the mask of a forward.

    Right padding needs none: a real token never sees what is to its right. So a mask is built only
    for padding before or inside a row, or where several queries meet a longer row of keys. A mask
    of a shape that does not fit is a ValueError.

    Args:
        attention_mask: None; [B, past + T] with 1 for real tokens; or [B, 1, T, K], bool or
            additive, used as is.
        num_keys: K, which exceeds past + T in caches allocated up front.
        past_len: tokens in the cache (a tensor in static caches).
        causal_path: whether attention can be causal without a mask.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return Visibility(attention_mask, is_causal=False)
    real_BK = _real_keys(attention_mask, num_queries, num_keys, past_len)
    if real_BK is None:
        if causal_path and num_queries == num_keys:
            return Visibility(None, is_causal=True)
        if isinstance(past_len, int) and num_keys == past_len + 1:
            return Visibility(None, is_causal=False)  # one new token, which sees everything
    queries_T1 = (torch.arange(num_queries, device=device) + past_len).unsqueeze(-1)
    keys_K = torch.arange(num_keys, device=device)
    causal = (keys_K <= queries_T1)[None, None]
    if real_BK is None:
        return Visibility(causal, is_causal=False)
    # Padding in front of a row sees itself: a softmax over no key at all would be NaN.
    in_front_BK = real_BK.cumsum(-1) == 0
    itself = (keys_K == queries_T1) & in_front_BK[:, None, None, :]
    mask = (causal & real_BK[:, None, None, :]) | itself
    return Visibility(mask, is_causal=False, left_pads_B=real_BK.int().argmax(-1))


def _real_keys(
    mask_BT: Tensor | None, num_queries: int, num_keys: int, past_len: int | Tensor
) -> Tensor | None:
    """The mask as bool [B, K]; None if it only marks padding to the right, which hides nothing."""
    if mask_BT is None:
        return None
    if isinstance(past_len, int) and mask_BT.shape[-1] != past_len + num_queries:
        raise ValueError(
            f"attention_mask is {list(mask_BT.shape)}; expected one column for each of the "
            f"{past_len} cached and {num_queries} new tokens"
        )
    real_BT = mask_BT.bool()
    # The only look at values: one synchronisation on an accelerator. Training passes no mask.
    if bool((real_BT[:, 1:] <= real_BT[:, :-1]).all()):
        return None
    return F.pad(real_BT, (0, num_keys - real_BT.shape[-1]), value=True)
