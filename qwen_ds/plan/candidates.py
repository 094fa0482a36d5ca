"""The ways to run a recipe on a machine: ZeRO stages, micro-batch sizes, recomputation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qwen_ds.plan.recomputation import Fit, fit_of, from_recipe, least_recomputation
from qwen_ds.plan.run import Run
from qwen_ds.plan.seconds import Cluster, Seconds, Work, launching_seconds, step_seconds
from qwen_ds.plan.step import Workload, split

BUDGETS = (1024, 2048, 4096, 8192, 16384)  # tokens_per_micro_batch, beside the recipe's own


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a recipe, and what it is predicted to take."""

    run: Run
    budget: int  # padded tokens of a micro-batch
    fit: Fit
    seconds: Seconds
    launching: float  # seconds of a step in which the CPU launches operations


def candidates(
    runs: Sequence[Run], cluster: Cluster, workload: Workload, every: Sequence[int] | None = None
) -> list[Candidate]:
    """Each run with each token budget, and the recomputation that the recipe asks for: under "auto"
    the least that fits, or all if none does. `every` lists choices of recomputation instead."""
    found = []
    for run in runs:
        compiled = run.recipe.model.compile is True
        work, last = Work(run.shape, run.saving, run.zero, compiled), None
        asked = run.recipe.model.activation_checkpointing
        choices = every or (() if asked == "auto" else (from_recipe(asked),))
        for budget in sorted({*BUDGETS, run.recipe.batch.tokens_per_micro_batch}):
            batch = replace(run.recipe.batch, tokens_per_micro_batch=budget)
            parts = split(workload, run.machine.ranks, batch, levels=run.levels_micro_batches)
            if parts == last:  # the rows are too few or too short for the budget to matter
                continue
            last = parts
            fits = [fit_of(run, parts.largest, choice) for choice in choices]
            for fit in fits or [least_recomputation(run, parts.largest)]:
                seconds = step_seconds(work, cluster, parts, workload.target_share, fit.every)
                launching = launching_seconds(work, parts, fit.every)
                found.append(Candidate(run, budget, fit, seconds, launching))
    return found


def best(found: Sequence[Candidate]) -> Candidate | None:
    """The fastest that fits. Of those within 1 % of it, the one with which the CPU has least to
    launch, by large micro-batches, and then the one that needs the least memory."""
    fitting = [candidate for candidate in found if candidate.fit.fits]
    limit = 1.01 * min((candidate.seconds.total for candidate in fitting), default=0.0)
    fast = (candidate for candidate in fitting if candidate.seconds.total <= limit)
    return min(fast, key=lambda c: (c.launching, c.fit.memory.total), default=None)
