"""Loss of each target token of right-padded rows, for looking at rows one by one.

Shapes: B rows, T longest row, D hidden, V vocabulary, N target tokens, C tokens of one chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen_ds.model.chatml import IGNORE
from qwen_ds.model.token_grid import on_grid

CHUNK_TOKENS = 128  # whose logits exist at a time: 78 MB of fp32 for 151,936 rows


@torch.no_grad()
def token_losses(
    transformer: nn.Module, lm_head: nn.Module, ids_BT: Tensor, labels_BT: Tensor
) -> Tensor:
    """-log p of each target token in nats, float32 [B, T], at the token's own place; 0 elsewhere.

    By the training formula, as evaluation is: neither dynamic NTK nor LogN. The softmax is fp32.
    The caller sees to eval mode. A row's first token has no loss, whatever its label.

    Args:
        transformer, lm_head: parts of the model, with whatever adapters are on them.
        ids_BT: int64, padded on the right.
        labels_BT: int64, IGNORE where a token is no target.
    """
    outputs = transformer(input_ids=ids_BT, use_cache=False, extend_context=False)
    is_target_BT = labels_BT != IGNORE
    is_target_BT[:, 0] = False
    hidden_ND = outputs.last_hidden_state[:, :-1][is_target_BT[:, 1:]]
    targets_N = labels_BT[is_target_BT]
    losses_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_ND.device)
    for start in range(0, len(targets_N), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        targets_C = targets_N[chunk]
        logits_CV = lm_head(on_grid(hidden_ND[chunk]))[: len(targets_C)].float()
        losses_N[chunk] = F.cross_entropy(logits_CV, targets_C, reduction="none")
    losses_BT = torch.zeros(ids_BT.shape, dtype=torch.float32, device=hidden_ND.device)
    losses_BT[is_target_BT] = losses_N
    return losses_BT
