"""The options that a run without memory is told: they fit, and the cheapest comes first."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from qwen_ds.plan.recomputation import MARGIN, fit_of, from_recipe
from qwen_ds.plan.remedy import SAVING, remedy
from qwen_ds.plan.resolve import resolve
from qwen_ds.plan.run import Base, Machine, Run
from qwen_ds.plan.step import largest_micro_batch
from qwen_ds.recipe.loading import LoadedRecipe
from qwen_ds.recipe.options import BatchOptions, LoraOptions, ModelOptions, Recipe

ALL_FOUR = ["c_attn", "c_proj", "w1", "w2"]


def run_of(
    gigabytes: float, ranks: int = 8, tokens: int = 8192, every: str = "none", method: str = "lora"
) -> Run:
    recipe = Recipe(
        method=method,  # type: ignore[arg-type]
        deepspeed="ds_configs/zero2.json",
        model=ModelOptions(activation_checkpointing=every),  # type: ignore[arg-type]
        lora=LoraOptions(r=64, targets=ALL_FOUR, special_rows="off"),
        batch=BatchOptions(tokens_per_micro_batch=tokens),
    )
    machine = Machine(ranks, ranks, True, gigabytes * 1e9, "of the GPU")
    return resolve(LoadedRecipe(recipe, frozenset()), machine, Base.qwen_7b(), rows=False)


def with_options(run: Run, told: str) -> Run:
    """The run as the told options make it, of those that no other JSON is part of."""
    options = dict(re.findall(r"--(\S+) (\S+)", told))
    assert "deepspeed" not in options
    tokens = int(options.get("batch.tokens_per_micro_batch", "8192"))
    choice = options.get("model.activation_checkpointing", "none")
    every: str | int = choice if choice in ("none", "all") else int(choice)
    model = replace(run.recipe.model, activation_checkpointing=every)  # type: ignore[arg-type]
    batch = replace(run.recipe.batch, tokens_per_micro_batch=tokens)
    return replace(run, recipe=replace(run.recipe, model=model, batch=batch))


def told_of(run: Run) -> str:
    return remedy(run, 512, 10_000, run.recipe.batch.tokens_per_micro_batch)


def peak(run: Run, longest: int = 512) -> float:
    asked = run.recipe.batch
    budget, ranks = asked.tokens_per_micro_batch, run.machine.ranks
    batch = largest_micro_batch(longest, asked.rows_per_step, budget, ranks)
    every = from_recipe(run.recipe.model.activation_checkpointing)
    return fit_of(run, batch, every).memory.total


@pytest.mark.parametrize("gigabytes", [80, 40, 24])
def test_what_is_told_fits_and_saves_enough_to_be_trusted(gigabytes: float) -> None:
    run = run_of(gigabytes)
    changed = with_options(run, told := told_of(run))
    assert peak(changed) <= (1 - MARGIN) * gigabytes * 1e9
    assert peak(changed) <= (1 - SAVING) * peak(run)
    assert f"(a memory peak of {peak(changed) / 1e9:.3g} of the {gigabytes} GB of the GPU" in told


def test_halves_of_a_large_micro_batch_come_before_recomputation_and_that_before_slivers() -> None:
    """At 80 GB a half is enough; at 24 GB slivers of 512 tokens without recomputation would fit,
    whose launches cost more than recomputing."""
    key = "batch.tokens_per_micro_batch"
    told = told_of(run_of(80))
    assert told.startswith(f"--{key} 4096 --resume.allow_changes {key} (")
    told = told_of(run_of(24))
    assert "--model.activation_checkpointing" in told
    slivers = replace(run_of(24), recipe=replace(run_of(24).recipe, batch=BatchOptions(128, 512)))
    assert peak(slivers) <= (1 - MARGIN) * 24e9


def test_micro_batches_that_are_smaller_than_the_recipe_allows_are_not_told_to_be_larger() -> None:
    """Their sampler levels them. Half of the recipe's 8,192 tokens would change nothing."""
    assert told_of(run_of(80)).startswith("--batch.tokens_per_micro_batch 4096 ")
    told = remedy(run_of(80), 512, 10_000, 2048)
    assert told.startswith("--model.activation_checkpointing ")


def test_zero_3_and_offloading_are_told_where_nothing_else_fits() -> None:
    assert told_of(run_of(12)).startswith("--deepspeed ds_configs/zero3.json ")
    full = run_of(30, ranks=1, every="all", method="full")
    assert told_of(full).startswith("--deepspeed ds_configs/zero3_offload.json ")


def test_it_is_said_where_nothing_fits_at_all() -> None:
    assert told_of(run_of(2)).startswith("shorter rows (data.max_tokens), or more or")
