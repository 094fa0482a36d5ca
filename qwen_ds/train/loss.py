"""The loss: cross-entropy summed over the target tokens, with logits that exist a chunk at a time.

Shapes: B rows, T longest row, D hidden, V vocabulary, N target tokens of the micro-batch, C tokens
of one chunk, K trainable token rows of the head (qwen_ds/train/special_rows.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen_ds.data.batches import target_places
from qwen_ds.model.token_grid import on_grid
from qwen_ds.model.token_loss import token_losses
from qwen_ds.plan.memory import chunk_tokens
from qwen_ds.train.special_rows import HeadWithRows

# (logits [C, V], targets [C]) -> sum of the losses; the logits become its gradient.
LossOfLogits = Callable[[Tensor, Tensor], Tensor]


def loss_of_logits(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Sum of the losses (fp32). The logits become its gradient, in their own dtype."""
    # The softmax is made in place: the chunk is the largest thing in memory, and it exists once.
    grad_CV = logits_CV.float()
    grad_CV -= grad_CV.amax(dim=-1, keepdim=True)
    target_logits_C = grad_CV.gather(1, targets_C[:, None])[:, 0]
    sums_C = grad_CV.exp_().sum(dim=-1)
    loss = (sums_C.log() - target_logits_C).sum()
    grad_CV /= sums_C[:, None]
    grad_CV[torch.arange(len(targets_C), device=targets_C.device), targets_C] -= 1.0
    logits_CV.copy_(grad_CV)
    return loss


def loss_formula(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """The same for a compiler, which reads the logits three times and writes them once; no fp32
    chunk exists. Its exp is computed twice, for less than it costs to keep."""
    exact_CV = logits_CV.float()
    largest_C1 = exact_CV.amax(dim=-1, keepdim=True)
    lse_C1 = (exact_CV - largest_C1).exp().sum(dim=-1, keepdim=True).log() + largest_C1
    loss = (lse_C1 - exact_CV.gather(1, targets_C[:, None])).sum()
    # int32: a CPU compares twice as many at once.
    ids_V = torch.arange(logits_CV.shape[1], dtype=torch.int32, device=logits_CV.device)
    is_target_CV = ids_V == targets_C[:, None].int()
    logits_CV.copy_((exact_CV - lse_C1).exp() - is_target_CV.float())
    return loss


class _HeadLoss(torch.autograd.Function):
    """Head and cross-entropy in one, with the gradients made in the forward pass.

    They are made while a chunk's logits exist, so nothing of size [N, V] is kept, and the backward
    pass does not need the frozen head. d(sum)/d(logits) = softmax(logits) - onehot(target).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        rows_KD: Tensor,
        ids_K: Tensor,
        loss_of: LossOfLogits,
    ) -> Tensor:
        need_hidden, need_weight, _, need_rows, *_ = ctx.needs_input_grad
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype, rows_KD.dtype
        loss_sum = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_hidden_ND = torch.empty_like(hidden_ND) if need_hidden else None
        # The head's gradients are sums over thousands of chunks, so they accumulate in fp32.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
        grad_rows_KD = torch.zeros_like(rows_KD, dtype=torch.float32) if need_rows else None
        # A copy only where the whole head is trained over a bf16 base: then it is fp32.
        weight_VD, rows_KD = weight_VD.to(hidden_ND.dtype), rows_KD.to(hidden_ND.dtype)
        step = chunk_tokens(weight_VD.shape[0])
        for start in range(0, hidden_ND.shape[0], step):
            targets_C = targets_N[start : start + step]
            hidden_CD = on_grid(hidden_ND[start : start + step])
            grad_CV = F.linear(hidden_CD, weight_VD)
            grad_CV.index_copy_(1, ids_K, F.linear(hidden_CD, rows_KD))
            # Until then they were the logits. Those of the grid's zeros are zeros, as is their
            # gradient. (.data: a compiler would look at the shape of what it is a view of.)
            loss_sum += loss_of(grad_CV[: len(targets_C)].data, targets_C)
            grad_CK = grad_CV[:, ids_K]
            grad_CV.index_fill_(1, ids_K, 0.0)  # the matrix's own rows had no part in these logits
            if grad_hidden_ND is not None:
                grad_hidden_CD = (grad_CV @ weight_VD).addmm_(grad_CK, rows_KD)
                grad_hidden_ND[start : start + step] = grad_hidden_CD[: len(targets_C)]
            if grad_weight_VD is not None:
                grad_weight_VD += torch.mm(grad_CV.t(), hidden_CD)
            if grad_rows_KD is not None:
                grad_rows_KD.addmm_(grad_CK.t().float(), hidden_CD.float())
            del grad_CV  # before the next chunk's logits are made
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_rows_KD)
        return loss_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_loss,) = grads
        grad_hidden_ND, grad_weight_VD, grad_rows_KD = (
            None if grad is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return grad_hidden_ND, grad_weight_VD, None, grad_rows_KD, None, None


def cross_entropy_sum(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    rows_KD: Tensor | None = None,
    ids_K: Tensor | None = None,
    loss_of: LossOfLogits = loss_of_logits,
) -> Tensor:
    """Sum over the tokens of -log softmax(hidden weight^T)[target].

    An fp32 scalar; zero (and zero gradients) for N = 0. The softmax is fp32. Head and rows are used
    in the dtype of the hidden states.

    Args:
        rows_KD: used in place of the head's rows ids_K; they get the gradient, those rows of the
            head get none.
        ids_K: int64 as the targets, each id once.
        loss_of: what computes the loss of a chunk's logits, and their gradient in their place.
    """
    if rows_KD is None or ids_K is None:
        rows_KD, ids_K = weight_VD.new_empty(0, weight_VD.shape[1]), targets_N.new_empty(0)
    return _HeadLoss.apply(hidden_ND, weight_VD, targets_N, rows_KD, ids_K, loss_of)


def compiled_loss() -> LossOfLogits:
    """`loss_formula`, compiled at its first use for chunks of all lengths."""
    return torch.compile(loss_formula, dynamic=True)


class LossHead(nn.Module):
    """The head of the model inside the loss, which `loss_of` computes from a chunk's logits.

    A module of its own because ZeRO-3 gathers parameters at module boundaries: lm_head comes once
    for all chunks (the engine registers `borrowed`). The head stays a child of the model alone, or
    its parameters would have two names.
    """

    def __init__(self, lm_head: nn.Linear) -> None:
        super().__init__()
        self.loss_of: LossOfLogits = loss_of_logits
        self._lm_head = (lm_head,)  # a tuple hides it from nn.Module's registration

    @property
    def lm_head(self) -> nn.Linear:
        return self._lm_head[0]

    @property
    def borrowed(self) -> list[nn.Parameter]:
        """The head's parameters that the loss uses: its matrix, and its trainable token rows."""
        head = self.lm_head
        rows = head.token_adapter.parameters() if isinstance(head, HeadWithRows) else ()
        return [*head.parameters(recurse=False), *rows]

    def forward(
        self, hidden_BTD: Tensor, labels_BT: Tensor, places_N: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy sum of labels_BT[:, t + 1] given hidden_BTD[:, t], without IGNORE.

        places_N is what `target_places(labels_BT)` gives. On a GPU the CPU waits until it is
        computed, so batches bring their own.
        """
        if places_N is None:
            places_N = target_places(labels_BT)
        # Only target tokens need logits: some 60 % of an ADGEN row, fewer of a padded one.
        hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, places_N)
        targets_N = labels_BT.flatten().index_select(0, places_N + 1)
        head = self.lm_head
        rows_KD = ids_K = None
        if isinstance(head, HeadWithRows):
            rows_KD, ids_K = head.token_adapter.trainable_tokens_delta, head.token_adapter.ids_K
        return cross_entropy_sum(hidden_ND, head.weight, targets_N, rows_KD, ids_K, self.loss_of)


class TrainingModel(nn.Module):
    """The module that DeepSpeed trains: (ids, labels, places of the targets) -> loss sum, or the
    loss of each token.

    It needs no attention mask: rows are right-padded, and a causal mask hides what is to the right
    of a token (test_padding_a_row_on_the_right_does_not_change_its_logits).

    Args:
        model: the model or its PEFT wrapper, whose parameters are trained.
        transformer, lm_head: parts of it.
    """

    def __init__(self, model: nn.Module, transformer: nn.Module, lm_head: nn.Linear) -> None:
        super().__init__()
        self.model = model
        self._transformer = (transformer,)
        self.loss_head = LossHead(lm_head)

    @property
    def transformer(self) -> Any:
        return self._transformer[0]

    def forward(
        self,
        ids_BT: Tensor,
        labels_BT: Tensor,
        places_N: Tensor | None = None,
        *,
        of_each_token: bool = False,
    ) -> Tensor:
        if of_each_token:  # here, since DeepSpeed's engine prepares ZeRO-3 for this call alone
            return token_losses(self.transformer, self.loss_head.lm_head, ids_BT, labels_BT)
        # extend_context: evaluation takes the training formula, too, without NTK and LogN.
        outputs = self.transformer(input_ids=ids_BT, use_cache=False, extend_context=False)
        return self.loss_head(outputs.last_hidden_state, labels_BT, places_N)
