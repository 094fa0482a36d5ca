"""The training loop: one iteration per optimizer step, every collective visible.

Shapes: B rows of a micro-batch, T its longest row.
"""

from __future__ import annotations

import math
from typing import NoReturn

import numpy as np
import torch

from qwen_ds import dist
from qwen_ds.config import Recipe
from qwen_ds.data.batches import Batch, evaluation_batches, make_batch
from qwen_ds.data.rows import TokenRows
from qwen_ds.errors import UserError
from qwen_ds.train.engine import Engine
from qwen_ds.train.output import Output
from qwen_ds.train.progress import Outcome, Progress, Step
from qwen_ds.train.schedule import lr_at
from qwen_ds.train.setup import Data


def total_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Optimizer steps of the run."""
    steps = max(1, math.ceil(recipe.optim.epochs * steps_per_epoch - 1e-9))
    return steps if recipe.optim.max_steps is None else min(steps, recipe.optim.max_steps)


def dropout_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """Dropout depends on the position alone, so a rerun and a resumed run drop the same activations."""
    return int(np.random.SeedSequence([seed, step, rank, micro_batch]).generate_state(1, np.uint64)[0] >> 1)


def train(recipe: Recipe, data: Data, engine: Engine, output: Output) -> Outcome:
    """Run all steps; writes metrics, checkpoints and the result into the run folder.

    Raises:
        UserError: the loss or the gradient is not finite. The weights are those of the last good step, saved.
    """
    steps_per_epoch = data.sampler.steps_per_epoch
    steps = total_steps(recipe, steps_per_epoch)
    eval_every = recipe.eval.every_steps or steps_per_epoch
    engine.train(True)
    with Progress(output.folder, steps, recipe.log.every_steps) as progress:
        for step in range(steps):
            progress.begin_step()
            epoch, step_in_epoch = divmod(step, steps_per_epoch)
            window = data.sampler.window(epoch, step_in_epoch)
            lr = lr_at(step, steps, recipe.optim)
            engine.set_lr(lr)
            loss, targets, grad_norm = train_step(recipe, step, window, data.train, engine, output)
            statistics = data.sampler.statistics(epoch, step_in_epoch)
            done = step + 1
            progress.end_step(Step(done, epoch, loss, targets, lr, grad_norm, engine.overflows, statistics))
            if data.eval is not None and (done % eval_every == 0 or done == steps):
                progress.evaluated(done, evaluation_loss(engine, data.eval, recipe.batch.tokens_per_micro_batch))
            if done % recipe.save.every_steps == 0 and done < steps:
                output.save_step(engine, done, recipe.save.keep)
        output.save_final(engine)
        return progress.outcome()


def train_step(
    recipe: Recipe, step: int, window: list[Batch], rows: TokenRows, engine: Engine, output: Output
) -> tuple[float, int, float]:
    """One optimizer step over all its micro-batches: loss sum and targets of all ranks, gradient norm.

    A step without anything to learn leaves the weights alone: (0, 0, 0).
    """
    world, rank = dist.world_size(), dist.rank()
    targets = int(dist.sum_floats(sum(batch.num_targets for batch in window))[0])
    if targets == 0:
        return 0.0, 0, 0.0
    window_loss = 0.0
    bad_rows: list[int] = []
    for i, batch in enumerate(window):
        torch.manual_seed(dropout_seed(recipe.seed, step, rank, i))
        loss_sum = engine.loss_sum(batch.ids_BT, batch.labels_BT)
        # DeepSpeed averages gradients over the ranks. Answers differ in length, so a mean of the ranks' means would
        # let a rank with few learnt tokens weigh as much as one with many: the sum is divided by the whole step's
        # token count, and DeepSpeed's average is cancelled by `world`.
        # Without it test_gradient_does_not_depend_on_the_split fails.
        engine.backward(loss_sum * (world / targets), last_of_step=i + 1 == len(window))
        value = loss_sum.item()
        window_loss += value
        if not math.isfinite(value):
            bad_rows += batch.row_ids
    loss, bad = dist.sum_floats(window_loss, len(bad_rows))
    if bad:  # on every rank, before the gradient can reach the weights
        stop_not_finite("loss", "in", bad_alone(bad_rows, rows, engine), step, rows, engine, output)
    all_rows = [row for batch in window for row in batch.row_ids]
    try:
        result = engine.step()
    except FloatingPointError as error:
        stop_not_finite(f"gradient ({error})", "among", all_rows, step, rows, engine, output)
    if not result.applied and not engine.uses_loss_scale:  # ZeRO has skipped the update
        stop_not_finite(f"gradient norm ({result.grad_norm})", "among", all_rows, step, rows, engine, output)
    return loss, targets, result.grad_norm


@torch.no_grad()
def evaluation_loss(engine: Engine, rows: TokenRows, tokens_per_micro_batch: int) -> float:
    """Loss per learnt token over all rows, by the training formula, dropout off (a collective)."""
    engine.train(False)
    loss = targets = 0.0
    for batch in evaluation_batches(rows, dist.world_size(), dist.rank(), tokens_per_micro_batch):
        loss += engine.loss_sum(batch.ids_BT, batch.labels_BT).item()
        targets += batch.num_targets
    loss, targets = dist.sum_floats(loss, targets)
    engine.train(True)
    return loss / max(targets, 1.0)


@torch.no_grad()
def bad_alone(row_ids: list[int], rows: TokenRows, engine: Engine) -> list[int]:
    """Those rows whose loss is not finite by themselves, or all of them if none is (a collective)."""
    count = int(dist.max_floats(len(row_ids))[0])
    found: list[int] = []
    for i in range(count):  # as many forwards on every rank: under ZeRO-3 each gathers the weights
        batch = make_batch(rows, np.array(row_ids[i : i + 1], dtype=np.int64))
        if not math.isfinite(engine.loss_sum(batch.ids_BT, batch.labels_BT).item()):
            found += batch.row_ids
    return found or row_ids


def stop_not_finite(
    what: str, where: str, row_ids: list[int], step: int, rows: TokenRows, engine: Engine, output: Output
) -> NoReturn:
    """End the run on every rank (a collective): name the rows, keep the weights of the last good step."""
    texts = dist.gather_texts("\n".join(rows.source(row) for row in row_ids))
    sources = [source for text in texts for source in text.split("\n") if source]
    more = f" and {len(sources) - 4} more" if len(sources) > 4 else ""
    kept = output.save_step(engine, step, keep=step + 1)
    raise UserError(
        f"step {step + 1}: the {what} is not finite, {where} {', '.join(sources[:4])}{more}; expected finite numbers "
        f"(lower optim.lr, or look at those rows); the weights after step {step} are kept in {kept}"
    )
