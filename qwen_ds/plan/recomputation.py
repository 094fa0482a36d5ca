"""Activation checkpointing: the least recomputation whose memory fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from qwen_ds.plan.activations import MicroBatch, recomputed_blocks
from qwen_ds.plan.memory import Memory, peak_memory
from qwen_ds.plan.run import Note, Run
from qwen_ds.plan.step import largest_micro_batch

# Share that stays free, for fragmentation and for what libraries allocate unknown to the formulas.
MARGIN = 0.08


@dataclass(frozen=True, slots=True)
class Fit:
    """A choice of recomputation and the memory that it takes."""

    every: int  # recompute every n-th block; 1: all, 0: none
    memory: Memory
    fits: bool


def recomputations(layers: int) -> list[int]:
    """Every choice, from no recomputation (0) over ever more blocks to all (1)."""
    # Different n can recompute equally many blocks (16 to 31: two of 32); the smallest is kept.
    by_count = {recomputed_blocks(layers, every): every for every in range(layers, 0, -1)}
    return [0, *(by_count[count] for count in sorted(by_count))]


def fit_of(run: Run, batch: MicroBatch, every: int) -> Fit:
    """The memory of a run whose largest micro-batch is `batch`, and whether it fits."""
    memory = peak_memory(run.shape, run.saving, run.zero, batch, every)
    return Fit(every, memory, memory.total <= (1 - MARGIN) * run.memory[0])


def least_recomputation(run: Run, batch: MicroBatch) -> Fit:
    """The first of `recomputations` that fits; all blocks if none does."""
    fits = (fit_of(run, batch, every) for every in recomputations(run.shape.layers))
    return next((fit for fit in fits if fit.fits), fit_of(run, batch, 1))


def in_recipe(every: int) -> Literal["none", "all"] | int:
    """The choice as model.activation_checkpointing spells it."""
    return "none" if every == 0 else "all" if every == 1 else every


def from_recipe(choice: str | int) -> int:
    """The inverse of `in_recipe`; the choice must not be "auto"."""
    return {"none": 0, "all": 1}[choice] if isinstance(choice, str) else choice


def decide_recomputation(run: Run, longest: int, num_rows: int, budget: int) -> Run:
    """The run with `auto` activation checkpointing replaced by the least that fits.

    The largest micro-batch of any step must fit, with MARGIN to spare. All ranks decide alike:
    under ZeRO-3 they gather in lock-step, so they must recompute alike.

    Args:
        longest: tokens of the data set's longest row.
        num_rows: its rows.
        budget: most padded tokens of a micro-batch, as its sampler has it.
    """
    recipe = run.recipe
    if recipe.model.activation_checkpointing != "auto":
        return run
    if recipe.lora.variant == "dora" and recipe.method == "lora":
        every, reason = 1, "the tensors that DoRA keeps are not predicted"
    else:
        rows_per_step = min(recipe.batch.rows_per_step, num_rows)
        batch = largest_micro_batch(longest, rows_per_step, budget, run.machine.ranks)
        fit = least_recomputation(run, batch)
        every, (given, source) = fit.every, run.memory
        reason = f"predicted peak {fit.memory.total / 1e9:.3g} of the {given / 1e9:.3g} GB {source}"
        reason += "" if fit.fits else ", more than there is"
    choice = in_recipe(every)
    recipe = replace(recipe, model=replace(recipe.model, activation_checkpointing=choice))
    note = Note("model.activation_checkpointing", choice, reason)
    return replace(run, recipe=recipe, notes=(*run.notes, note))
