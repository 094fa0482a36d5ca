"""The loss of each target token: that of the model's own logits, a chunk at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from qwen_ds.model import token_loss
from qwen_ds.model.chatml import IGNORE


def test_each_target_has_its_loss_under_its_own_token(
    small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(small_dir).eval()
    monkeypatch.setattr(token_loss, "CHUNK_TOKENS", 4)  # several chunks, the last one shorter
    torch.manual_seed(0)
    ids_BT = torch.randint(0, 200, (3, 9))
    labels_BT = ids_BT.clone()
    labels_BT[0, :3] = labels_BT[1, 5:] = labels_BT[2, 4] = IGNORE  # the first of row 1 stays
    with torch.no_grad():
        logits_BTV = model(ids_BT).logits.float()
    wanted_BT = torch.zeros(3, 9)
    for row in range(3):
        for at in range(1, 9):
            if labels_BT[row, at] != IGNORE:
                wanted_BT[row, at] = F.cross_entropy(logits_BTV[row, at - 1], labels_BT[row, at])
    found_BT = token_loss.token_losses(model.transformer, model.lm_head, ids_BT, labels_BT)
    assert_close(found_BT, wanted_BT)
