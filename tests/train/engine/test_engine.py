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
from qwen_ds.train.engine.state import TrainableState


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
        assert type(found) is torch.optim.AdamW and found.defaults["fused"] and not made
        assert found.defaults["lr"] == 0.5 and found.defaults["weight_decay"] == 0.25


@pytest.mark.parametrize(("device", "supported"), [("cpu", False), ("cuda", True), ("cuda", False)])
def test_fp16_is_refused_where_deepspeed_does_not_train_it_but_for_cpus(
    device: str, supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = SimpleNamespace(device_name=lambda: device, is_fp16_supported=lambda: supported)
    monkeypatch.setattr(engine, "get_accelerator", lambda: accelerator)
    if device == "cuda" and not supported:
        with pytest.raises(UserError, match="float16.*expected one of compute capability 7.0"):
            engine._allow_fp16()
    else:
        engine._allow_fp16()
        assert accelerator.is_fp16_supported()


def test_the_fused_kernel_takes_the_steps_of_the_formula() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, in double precision, from the first step on."""
    options = OptimOptions(lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    start_N, gradients_TN = (torch.randn(*size, generator=generator) for size in ((65,), (5, 65)))
    weights = nn.Parameter(start_N.clone())
    optimizer = engine.make_optimizer([weights], options, SimpleNamespace(offload_optimizer=False))  # type: ignore[arg-type]
    exact_N, first_N, second_N = start_N.double(), torch.zeros(65), torch.zeros(65)
    for step, gradient_N in enumerate(gradients_TN.double(), start=1):
        weights.grad = gradient_N.float()
        optimizer.step()
        first_N = 0.9 * first_N + 0.1 * gradient_N
        second_N = 0.99 * second_N + 0.01 * gradient_N**2
        root_N = (second_N / (1 - 0.99**step)).sqrt() + 1e-6
        exact_N = exact_N * (1 - 1e-2 * 0.1) - 1e-2 * first_N / (1 - 0.9**step) / root_N
    change_N = exact_N - start_N
    assert ((weights - start_N - change_N).norm() / change_N.norm()).item() < 1e-5


def test_the_count_of_updates_lies_beside_the_weights() -> None:
    """There the fused kernel reads it: on a GPU a count on the CPU would be refused."""
    model = nn.Linear(2, 2, device="meta")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    TrainableState(model, optimizer, 0, torch.device("meta")).make_moments(3)
    assert {optimizer.state[p]["step"].device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("place", ["wandb.errors.errors", "builtins"])
def test_a_monitor_that_nobody_has_logged_in_to_is_the_users_to_mend(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other error of DeepSpeed's start stays what it is."""
    kind = type("UsageError", (Exception,), {"__module__": place})

    def fails(**settings: Any) -> None:
        raise kind("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(deepspeed, "initialize", fails)
    engine_json = {"zero_optimization": {"stage": 2}}
    resolved: Any = SimpleNamespace(
        stage=2,
        engine_json=engine_json,
        offload_optimizer=False,
        sums_locally=True,
        recipe=Recipe(deepspeed="my.json"),
    )
    model: Any = nn.Linear(1, 1)
    with pytest.raises(Exception, match="No API key configured") as found:
        engine.TrainingEngine(model, OptimOptions(), resolved)
    assert isinstance(found.value, UserError) == (place != "builtins")
    if place != "builtins":
        assert str(found.value).startswith("my.json: wandb: No API key configured")


@pytest.mark.parametrize(
    ("stage", "section", "offload", "clips", "knows_norm"),
    [
        (0, None, False, True, True),
        (1, None, False, True, True),
        (2, None, False, True, True),
        (2, "bf16", False, True, True),
        (3, "bf16", False, False, True),
        (1, "bf16", False, False, False),
        (2, "fp16", False, False, False),
        (2, None, True, False, False),
    ],
)
def test_the_gradient_is_clipped_here_wherever_deepspeed_has_a_switch_for_it(
    stage: int, section: str | None, offload: bool, clips: bool, knows_norm: bool
) -> None:
    asked: dict[str, Any] = {
        "zero_optimization": {"stage": stage}, "gradient_clipping": 0.5, "train_batch_size": 1,
    }  # fmt: skip
    if section:
        asked[section] = {"enabled": True}
    resolved: Any = SimpleNamespace(stage=stage, engine_json=asked, offload_optimizer=offload)
    config, *found = engine._own_update(resolved)
    assert found == [clips, knows_norm]
    read = deepspeed.DeepSpeedConfig(config)
    assert read.gradient_clipping == (0.0 if clips else 0.5)
    assert read.zero_config.compute_grad_norm == (not clips or stage == 0)
    assert asked["gradient_clipping"] == 0.5, "the run's own JSON keeps what was asked"
