"""The learning rate of each optimizer step."""

from __future__ import annotations

import math

from qwen_ds.recipe.options import OptimOptions


def lr_at(step: int, total_steps: int, optim: OptimOptions) -> float:
    """Learning rate of optimizer step `step` (0-based) of `total_steps`.

    Linear warm-up over `warmup_steps` (the first step already moves), then constant, linear to 0, or half a cosine to 0
    (Loshchilov and Hutter 2017, without restarts).
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    if optim.schedule == "linear":
        return optim.lr * (1.0 - progress)
    return optim.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
