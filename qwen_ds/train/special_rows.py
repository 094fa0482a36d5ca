"""Trainable token rows: those of <|endoftext|>, <|im_start|> and <|im_end|> in embedding and head.

A base model needs them to learn to stop. Pre-training never showed it the last two, so their rows
are as initialisation left them, and LoRA on the layers between cannot make up for that: such a
model answers and never stops. Here only those rows are trained, as fp32 parameters beside the
frozen matrices (24,576 parameters of the 7B). Nothing as large as a matrix is ever copied
(test_nothing_of_the_matrices_is_copied).

Names and values are those of PEFT's `trainable_token_indices`. In spite of its name,
`<module>.token_adapter.trainable_tokens_delta` holds the new values of the rows, which are used in
the base's dtype.

Shapes: B rows of a batch, T tokens, D hidden, V vocabulary, K special rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Rows(nn.Module):
    """Trainable rows of a matrix, in the module that uses them: ZeRO-3 gathers by module."""

    ids_K: Tensor

    def __init__(self, ids: Sequence[int], weight_VD: Tensor) -> None:
        super().__init__()
        self.register_buffer("ids_K", torch.tensor(ids, device=weight_VD.device), persistent=False)
        self.trainable_tokens_delta = nn.Parameter(weight_VD.detach()[self.ids_K].float())


class EmbeddedRows(_Rows):
    def forward(self, ids_BT: Tensor, x_BTD: Tensor) -> Tensor:
        """x_BTD with the trained rows at the positions of their ids."""
        hit_BTK = ids_BT[..., None] == self.ids_K
        # The rows are looked up in fp32 and then cast, so that the gradients of all positions add
        # up in fp32. Positions without a hit look up a row, too, which `where` drops: a boolean
        # index would make the CPU wait for the GPU.
        rows_BTD = F.embedding(hit_BTK.int().argmax(-1), self.trainable_tokens_delta)
        return torch.where(hit_BTK.any(-1, keepdim=True), rows_BTD.to(x_BTD.dtype), x_BTD)


class HeadRows(_Rows):
    def forward(self, hidden_BTD: Tensor, logits_BTV: Tensor) -> Tensor:
        """logits_BTV with the logits that the trained rows give."""
        logits_BTK = F.linear(hidden_BTD, self.trainable_tokens_delta.to(hidden_BTD.dtype))
        return logits_BTV.index_copy(-1, self.ids_K, logits_BTK)


class EmbeddingWithRows(nn.Embedding):
    """A frozen embedding with some trainable rows; it takes over `base`'s parameter by name."""

    def __init__(self, base: nn.Embedding, ids: Sequence[int]) -> None:
        """`base`'s weight must be whole (gathered, under ZeRO-3)."""
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        self.weight = base.weight
        self.token_adapter = EmbeddedRows(ids, base.weight)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.token_adapter(ids_BT, super().forward(ids_BT))


class HeadWithRows(nn.Linear):
    """A frozen, bias-free head with some trainable rows; `base` as for EmbeddingWithRows.

    Training uses the loss head instead of this forward pass (qwen_ds/train/loss.py).
    """

    def __init__(self, base: nn.Linear, ids: Sequence[int]) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight
        self.token_adapter = HeadRows(ids, base.weight)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.token_adapter(hidden_BTD, super().forward(hidden_BTD))
