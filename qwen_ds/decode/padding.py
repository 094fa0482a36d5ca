"""Left padding of a batch, so that the next token of every row follows the last column.

Shapes: B rows, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Pad rows into ids_BT and mask_BT (1 for real tokens), both int64, on `device`."""
    longest = max(map(len, rows))
    ids_BT = torch.full((len(rows), longest), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    for row, ids_T, mask_T in zip(rows, ids_BT, mask_BT, strict=True):
        ids_T[longest - len(row) :] = torch.as_tensor(row)
        mask_T[longest - len(row) :] = 1
    return ids_BT.to(device), mask_BT.to(device)
