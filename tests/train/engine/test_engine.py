"""The engine's optimizer is torch's own, unless it is offloaded beside a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

from qwen_ds.recipe.options import OptimOptions
from qwen_ds.train.engine import engine


@pytest.mark.parametrize(
    ("offload", "device", "compiled"),
    [(False, "cuda", False), (True, "cpu", False), (True, "cuda", True)],
)
def test_the_compiled_one_serves_only_offload_beside_a_gpu(
    offload: bool, device: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []
    accelerator = SimpleNamespace(device_name=lambda: device)
    monkeypatch.setattr(engine, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(
        deepspeed.ops.adam, "DeepSpeedCPUAdam", lambda parameters, **settings: made.append(settings)
    )
    options = OptimOptions(lr=0.5, weight_decay=0.25)
    resolved: Any = SimpleNamespace(offload_optimizer=offload)
    found = engine.make_optimizer([nn.Parameter(torch.zeros(2))], options, resolved)
    if compiled:
        assert made[0]["lr"] == 0.5 and made[0]["weight_decay"] == 0.25 and made[0]["adamw_mode"]
    else:
        assert type(found) is torch.optim.AdamW and not made
        assert found.defaults["lr"] == 0.5 and found.defaults["weight_decay"] == 0.25
