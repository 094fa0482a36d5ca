"""The settings that fit when a run is out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qwen_ds.plan.activations import recomputed_blocks
from qwen_ds.plan.memory import peak_memory
from qwen_ds.plan.recomputation import MARGIN, from_recipe, in_recipe, recomputations
from qwen_ds.plan.run import Run
from qwen_ds.plan.step import largest_micro_batch
from qwen_ds.plan.traffic import Zero

# What has just failed was predicted to take more than it had to. Only a change that is predicted to
# save this share of it can be trusted to help.
SAVING = 0.1
# A micro-batch costs as much beside its tokens as this many tokens do: 30 ms in which a CPU
# launches its operations, at 15,000 tokens a second.
LAUNCHES = 450
SMALLEST = 256  # tokens of a micro-batch


def remedy(run: Run, longest: int, num_rows: int, budget: int) -> str:
    """Options under which the run is predicted to fit, those that cost least time first.

    Fewer tokens a micro-batch and more recomputation change no number but for rounding, so they
    come before ZeRO-3 and its offloading. The arguments are those of `decide_recomputation`.
    """
    memory, source = run.memory
    rows_per_step, ranks = min(run.recipe.batch.rows_per_step, num_rows), run.machine.ranks
    batch = largest_micro_batch(longest, rows_per_step, budget, ranks)
    current = from_recipe(run.recipe.model.activation_checkpointing)
    now = peak_memory(run.shape, run.saving, run.zero, batch, current).total
    limit = min((1 - MARGIN) * memory, (1 - SAVING) * now)
    for zero, json in _zeros(run):
        for tokens, every in _settings(run, current, budget):
            parts = largest_micro_batch(longest, rows_per_step, tokens, ranks)
            peak = peak_memory(run.shape, run.saving, zero, parts, every).total
            if peak > limit:
                continue
            changes = {"deepspeed": json} if json else {}
            if tokens != budget:
                changes["batch.tokens_per_micro_batch"] = str(tokens)
            # The run folder's recipe is another now: it has to be told that this is meant.
            allowed = [*run.recipe.resume.allow_changes, *changes]
            if every != current:  # which any run may change
                changes["model.activation_checkpointing"] = str(in_recipe(every))
            words = [f"--{key} {value}" for key, value in changes.items()]
            if allowed:
                words.append(f"--resume.allow_changes {' '.join(allowed)}")
            if changes:
                return (
                    f"{' '.join(words)} (a memory peak of {peak / 1e9:.3g} of the "
                    f"{memory / 1e9:.3g} GB {source} is then predicted)"
                )
    return "shorter rows (data.max_tokens), or more or larger GPUs: no setting is predicted to fit"


def _zeros(run: Run) -> Iterator[tuple[Zero, str]]:
    """ZeRO as it is, then the files of ds_configs/ that hold less on a GPU."""
    yield run.zero, ""
    whole = replace(run.zero, stage=3, reduce_bucket=run.shape.hidden**2, hpz=1)
    if run.zero.stage < 3 and run.machine.ranks > 1:
        yield whole, "ds_configs/zero3.json"
    if run.machine.on_gpu and not run.zero.offload_parameters:
        offloaded = replace(whole, offload_optimizer=True, offload_parameters=True)
        yield offloaded, "ds_configs/zero3_offload.json"


def _settings(run: Run, current: int, budget: int) -> list[tuple[int, int]]:
    """(tokens of a micro-batch, recomputation every n-th block), from the fastest on."""
    layers, budgets = run.shape.layers, [budget]
    while budgets[-1] // 2 >= SMALLEST:
        budgets.append(budgets[-1] // 2)
    begins = recomputed_blocks(layers, current)
    choices = [n for n in recomputations(layers) if recomputed_blocks(layers, n) >= begins]
    # A recomputed block runs forward once more, beside forward and backward: half as much again for
    # LoRA, a third in full training.
    again = (1 / 3 if run.recipe.method == "full" else 1 / 2) / layers
    return sorted(
        ((tokens, every) for tokens in budgets for every in choices),
        key=lambda each: again * recomputed_blocks(layers, each[1]) + LAUNCHES / each[0],
    )
