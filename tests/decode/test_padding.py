"""The one left-padding."""

from __future__ import annotations

import torch

from qwen_ds.decode.padding import pad_left


def test_the_last_token_of_every_row_stands_in_the_last_column() -> None:
    ids_BT, mask_BT = pad_left([[1, 2, 3], [4], (5, 6)], 9, torch.device("cpu"))
    assert ids_BT.tolist() == [[1, 2, 3], [9, 9, 4], [9, 5, 6]]
    assert mask_BT.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert ids_BT.dtype == mask_BT.dtype == torch.int64
