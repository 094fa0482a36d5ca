"""Loss of reference answers under a served model, whatever adapter is asked for.

Each row runs alone: in a batch the last bits of a loss would depend on who else is in it, and a
resumed run would write other bytes.

Shapes: N target tokens, D hidden, V rows of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwen_ds.model.chatml import IGNORE
from qwen_ds.model.token_loss import token_losses
from serve.engine.adapters import ServedAdapters
from serve.engine.engine import ServingEngine


class ReferenceLosses:
    """Losses under one loaded model."""

    def __init__(self, engine: ServingEngine) -> None:
        self._engine = engine
        self._model: Any = engine.model

    def of(
        self, prompt_ids: Sequence[int], answer_ids: Sequence[int], adapter: str | None
    ) -> float | None:
        """-log p of an answer after its prompt, in nats, a sum over its tokens.

        None without an answer, or where the two together are longer than the context or than the
        device has memory for.
        """
        if not answer_ids or len(prompt_ids) + len(answer_ids) > self._engine.context:
            return None
        adapters = self._engine.adapters
        head: nn.Module = self._model.lm_head
        if adapters is None:
            return loss_of_answer(self._model.transformer, head, prompt_ids, answer_ids)
        length = len(prompt_ids) + len(answer_ids)
        with adapters.acting_on_row(adapter, length, self._engine.device):
            head = _RowHead(head, adapters, adapter)
            return loss_of_answer(self._model.transformer, head, prompt_ids, answer_ids)


class _RowHead(nn.Module):
    """A head with adapters, for the tokens of one row."""

    def __init__(self, head: nn.Module, adapters: ServedAdapters, adapter: str | None) -> None:
        super().__init__()
        self._head, self._adapters, self._adapter = head, adapters, adapter

    def forward(self, hidden_ND: Tensor) -> Tensor:
        self._adapters.set_due(self._adapter, len(hidden_ND), hidden_ND.device)
        logits_1NV: Tensor = self._head(hidden_ND[None])
        return logits_1NV[0]


def loss_of_answer(
    transformer: nn.Module, head: nn.Module, prompt_ids: Sequence[int], answer_ids: Sequence[int]
) -> float | None:
    """-log p of an answer in nats; None where the device has no memory for it."""
    device = next(transformer.parameters()).device
    ids_1T = torch.tensor([[*prompt_ids, *answer_ids]], device=device)
    labels_1T = ids_1T.clone()
    labels_1T[:, : len(prompt_ids)] = IGNORE
    try:
        losses_1T = token_losses(transformer, head, ids_1T, labels_1T)
    except torch.OutOfMemoryError:
        return None
    return float(losses_1T.double().sum())
