"""Automatic activation checkpointing: what is chosen, what is said about it, what it can rely
on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwen_ds.data.batches import Part, StepSampler
from qwen_ds.plan.activations import recomputed_blocks
from qwen_ds.plan.recomputation import (
    MARGIN,
    decide_recomputation,
    fit_of,
    from_recipe,
    in_recipe,
    recomputations,
)
from qwen_ds.plan.resolve import resolve
from qwen_ds.plan.run import Base, Machine, Run
from qwen_ds.plan.step import Workload, largest_micro_batch, split
from qwen_ds.recipe.loading import LoadedRecipe
from qwen_ds.recipe.options import BatchOptions, LoraOptions, ModelOptions, Recipe
from qwen_ds.train.survive import resume

CPU = Machine(1, 1, False, 8e9, "of free memory for each rank")


class FakeRows:
    """Token rows of which only the lengths are asked for."""

    pad_id = 0

    def __init__(self, lens: Sequence[int] | np.ndarray) -> None:
        self.lens = np.asarray(lens, np.int32)
        self.learnt = self.lens
        self.parts = (Part(len(self.lens), 1.0),)

    def __len__(self) -> int:
        return len(self.lens)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(self.lens[row], np.int32), np.zeros(self.lens[row], np.int32)


def run_of(
    small_dir: Path, machine: Machine = CPU, lora: LoraOptions | None = None, **model: object
) -> Run:
    options = ModelOptions(path=str(small_dir), dtype="bfloat16", **model)  # type: ignore[arg-type]
    recipe = Recipe(model=options, lora=lora or LoraOptions())
    return resolve(LoadedRecipe(recipe, frozenset()), machine, Base.read(small_dir), rows=False)


def chosen(small_dir: Path, longest: int, rows: int, **model: object) -> tuple[str | int, str]:
    run = run_of(small_dir, **model)  # type: ignore[arg-type]
    decided = decide_recomputation(run, longest, rows, run.recipe.batch.tokens_per_micro_batch)
    notes = [note for note in decided.notes if note.option == "model.activation_checkpointing"]
    assert all(note.choice == decided.recipe.model.activation_checkpointing for note in notes)
    return decided.recipe.model.activation_checkpointing, notes[0].reason if notes else ""


def test_auto_takes_the_least_recomputation_that_fits(small_dir: Path) -> None:
    """From none to all blocks as the memory shrinks; each fits, and the next lesser one does
    not."""
    run = run_of(small_dir)
    batch = largest_micro_batch(400, 32, BatchOptions().tokens_per_micro_batch, 1)
    layers = run.shape.layers
    peaks = {every: fit_of(run, batch, every).memory.total for every in recomputations(layers)}
    assert list(peaks) == [0, 3, 2, 1]
    assert list(peaks.values()) == sorted(peaks.values(), reverse=True)
    for every, peak in peaks.items():
        enough = peak / (1 - MARGIN) / 1e9
        assert chosen(small_dir, 400, 32, memory_gb=1.0001 * enough)[0] == in_recipe(every)
        less = chosen(small_dir, 400, 32, memory_gb=0.9999 * enough)[0]
        assert less != in_recipe(every) or every == 1


def test_the_choice_is_explained(small_dir: Path) -> None:
    choice, why = chosen(small_dir, 30, 8)
    assert choice == "none" and why.startswith("predicted peak 0.0")
    assert why.endswith("of the 8 GB of free memory for each rank")
    choice, why = chosen(small_dir, 30, 8, memory_gb=1e-4)
    assert choice == "all" and why.endswith("GB that model.memory_gb allows, more than there is")


def test_a_choice_of_the_users_is_left_alone(small_dir: Path) -> None:
    assert chosen(small_dir, 30, 8, activation_checkpointing=2) == (2, "")


def test_dora_recomputes_everything_since_its_tensors_are_not_predicted(small_dir: Path) -> None:
    run = decide_recomputation(run_of(small_dir, lora=LoraOptions(variant="dora")), 30, 8, 99)
    assert run.recipe.model.activation_checkpointing == "all"


def test_a_run_resumes_whatever_auto_chooses_then() -> None:
    """The memory that is free may have changed, the numbers have not."""
    first = Recipe(model=ModelOptions(activation_checkpointing="none"))
    second = replace(first, model=ModelOptions(activation_checkpointing=2, memory_gb=10.0))
    one, two = (resume.identity(recipe, {}, "") for recipe in (first, second))
    assert one == two != resume.identity(Recipe(seed=1), {}, "")


def test_no_micro_batch_of_training_exceeds_the_one_that_is_planned_for() -> None:
    rng = np.random.default_rng(0)
    for world, rows, budget in ((1, 16, 300), (8, 128, 2048), (3, 7, 64), (4, 64, 10**6)):
        lens = rng.integers(2, 300, 200).astype(np.int32)
        planned = largest_micro_batch(int(lens.max()), rows, budget, world)
        sampler = StepSampler(FakeRows(lens), rows, 0, world, 0, budget)
        steps = (sampler.plan(0, step) for step in range(sampler.steps_per_epoch))
        parts = (part for ranks in steps for of_rank in ranks for part in of_rank)
        assert max(sampler.size(part) for part in parts) <= planned.tokens


@pytest.mark.parametrize("budget", [512, 4096])
def test_a_step_is_planned_with_the_padding_of_training(budget: int) -> None:
    workload = Workload.like(64, 157, 0.66, 508)
    sampler = StepSampler(FakeRows(workload.lens), 64, 0, 1, 0, budget)
    planned, trained = split(workload, 1, BatchOptions(64, budget)), sampler.statistics(0, 0)
    assert planned.padded_tokens == trained.padded_tokens > trained.tokens
    assert planned.micro_batches == trained.micro_batches


def test_recomputations_go_from_none_to_all_without_repeating_a_count() -> None:
    counts = [recomputed_blocks(32, every) for every in recomputations(32)]
    assert counts == sorted(set(counts)) and counts[0] == 0 and counts[-1] == 32


@pytest.mark.parametrize("every", [0, 1, 2, 7])
def test_a_choice_is_spelled_and_read_back(every: int) -> None:
    assert from_recipe(in_recipe(every)) == every
