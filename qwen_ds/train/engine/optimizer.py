"""The optimizer that DeepSpeed gets."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from qwen_ds.plan.deepspeed_json import ResolvedConfig
from qwen_ds.recipe.options import OptimOptions


def make_optimizer(
    parameters: list[nn.Parameter], optim: OptimOptions, resolved: ResolvedConfig
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019): torch's own, which needs no compiler.

    DeepSpeed's compiled one serves only where the JSON offloads the optimizer on a GPU machine:
    there the update runs on the CPU, and its speed counts.
    """
    settings: dict[str, Any] = {
        "lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay,
    }  # fmt: skip
    if resolved.offload_optimizer and get_accelerator().device_name() == "cuda":
        return deepspeed.ops.adam.DeepSpeedCPUAdam(parameters, adamw_mode=True, **settings)
    return torch.optim.AdamW(parameters, **settings)
