"""The schedule of a run as pure functions of the position: steps, learning rate, dropout seeds."""

from __future__ import annotations

import math

import numpy as np

from qwen_ds.recipe.options import OptimOptions


def total_steps(optim: OptimOptions, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    # Less 1e-9: in floats, 0.07 epochs of 100 steps are 7.000000000000001 steps.
    steps = max(1, math.ceil(optim.epochs * steps_per_epoch - 1e-9))
    return steps if optim.max_steps is None else min(steps, optim.max_steps)


def lr_at(step: int, total_steps: int, optim: OptimOptions) -> float:
    """Learning rate of optimizer step `step` (0-based) of `total_steps`.

    Linear warm-up over `warmup_steps` (the first step already moves), then constant, linear to 0,
    or half a cosine to 0 (Loshchilov and Hutter 2017, without restarts). 0 is reached after
    `decay_steps`, or at the end of the run.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    end = total_steps if optim.decay_steps is None else optim.decay_steps
    progress = min(1.0, (step - optim.warmup_steps) / max(1, end - optim.warmup_steps))
    if optim.schedule == "linear":
        return optim.lr * (1.0 - progress)
    return optim.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def dropout_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """Seed of a micro-batch's dropout; all arguments count from 0.

    It depends on the position alone, so a rerun and a resumed run drop the same activations.
    """
    sequence = np.random.SeedSequence([seed, step, rank, micro_batch])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)
