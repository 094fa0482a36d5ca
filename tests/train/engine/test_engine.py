"""The engine's optimizer is torch's own, unless it is offloaded beside a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

from qwen_ds.errors import UserError
from qwen_ds.recipe.options import OptimOptions, Recipe
from qwen_ds.train.engine import engine


@pytest.mark.parametrize(
    ("offload", "device", "compiled"),
    [(False, "cuda", False), (True, "cpu", False), (True, "cuda", True)],
)
def test_the_compiled_one_serves_only_offload_beside_a_gpu(
    offload: bool, device: str, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
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


@pytest.mark.parametrize("place", ["wandb.errors.errors", "builtins"])
def test_a_monitor_that_nobody_has_logged_in_to_is_the_users_to_mend(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other error of DeepSpeed's start stays what it is."""
    kind = type("UsageError", (Exception,), {"__module__": place})

    def fails(**settings: Any) -> None:
        raise kind("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(deepspeed, "initialize", fails)
    resolved: Any = SimpleNamespace(
        stage=2, engine_json={}, offload_optimizer=False, recipe=Recipe(deepspeed="my.json")
    )
    model: Any = nn.Linear(1, 1)
    with pytest.raises(Exception, match="No API key configured") as found:
        engine.TrainingEngine(model, OptimOptions(), resolved)
    assert isinstance(found.value, UserError) == (place != "builtins")
    if place != "builtins":
        assert str(found.value).startswith("my.json: wandb: No API key configured")
