"""The training loop: one iteration per optimizer step, every collective visible.

Shapes: B rows of a micro-batch, T its longest row.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from qwen_ds import dist
from qwen_ds.data.ahead import Window, WindowsAhead
from qwen_ds.data.batches import make_batch
from qwen_ds.data.rows.token_rows import TokenRows
from qwen_ds.errors import UserError
from qwen_ds.recipe.options import Recipe
from qwen_ds.train.engine.engine import Engine
from qwen_ds.train.observe.evaluation import BestLoss, Evaluator
from qwen_ds.train.observe.profiler import StepProfiler
from qwen_ds.train.observe.progress import Hardware, Outcome, Progress, Step
from qwen_ds.train.schedule import lr_at
from qwen_ds.train.setup import Data
from qwen_ds.train.survive.checkpoint import Checkpoint
from qwen_ds.train.survive.result import Output
from qwen_ds.train.survive.saver import RunState, Saver
from qwen_ds.train.survive.stop import StopRequest
from qwen_ds.train.survive.watchdog import Watchdog


class NotFinite(ArithmeticError):
    """The loss or the gradient is not finite; raised on every rank, before the weights are touched."""


def total_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Optimizer steps of the run."""
    steps = max(1, math.ceil(recipe.optim.epochs * steps_per_epoch - 1e-9))
    return steps if recipe.optim.max_steps is None else min(steps, recipe.optim.max_steps)


def dropout_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """Dropout depends on the position alone, so a rerun and a resumed run drop the same activations."""
    return int(
        np.random.SeedSequence([seed, step, rank, micro_batch]).generate_state(1, np.uint64)[0] >> 1
    )


def train(
    recipe: Recipe,
    data: Data,
    engine: Engine,
    saver: Saver,
    output: Output,
    watchdog: Watchdog,
    resumed: Checkpoint | None = None,
) -> Outcome:
    """Run all steps that are left; writes metrics, checkpoints and the result into the run folder.

    Raises:
        UserError: the loss or the gradient is not finite. The weights are those of the last good step, saved.
    """
    steps_per_epoch = data.sampler.steps_per_epoch
    steps = total_steps(recipe, steps_per_epoch)
    first = resumed.step if resumed else 0
    saved = resumed.state if resumed else {}
    best, evaluated = BestLoss(**saved.get("best", {})), saved.get("evaluated", True)
    hardware = Hardware.of(engine.device, output.base, recipe.method)
    progress = Progress(
        output.folder, steps, recipe.log.every_steps, hardware, first, saved.get("progress")
    )
    profiler = StepProfiler(recipe.log.profile_steps, output.folder / "profile", engine.device)
    windows = WindowsAhead(data.sampler, steps, pinned=engine.device.type == "cuda")
    evaluator = make_evaluator(recipe, data, output.base, watchdog)

    def state(step: int) -> RunState:
        schedule = {
            "name": recipe.optim.schedule,
            "steps": steps,
            "next_lr": lr_at(step, steps, recipe.optim),
        }
        return RunState(step, steps_per_epoch, progress.state(), schedule, best, evaluated)

    engine.train(True)
    with progress, windows, StopRequest(dist.job_ends_at(), recipe.save.before_minutes) as request:
        if not evaluated:
            best, evaluated = evaluate(evaluator, engine, progress, first, best), True
        for step in range(first, steps):
            if best.out_of_patience(recipe.eval.patience):
                break
            progress.begin_step()
            profiler.begin_step(step + 1)
            try:
                finished = train_step(
                    recipe, step, steps, data, windows, engine, watchdog, profiler
                )
            except NotFinite as error:
                stop_not_finite(error, engine, saver, state(step))
            profiler.end_step(step + 1)
            progress.end_step(finished)
            done = finished.number
            watchdog.at(done, "agreeing to go on")
            stop_because = request.agreed() if done < steps else None
            due = evaluator is not None and evaluator.due(done, steps, steps_per_epoch)
            evaluated = not due or stop_because is None
            if due and evaluated:
                best = evaluate(evaluator, engine, progress, done, best)
            last = done == steps or best.out_of_patience(recipe.eval.patience)
            if stop_because or last or done % recipe.save.every_steps == 0 or best.step == done:
                watchdog.at(done, "saving")
                saver.save(engine, state(done))
            if stop_because:
                return stopped(progress, saver, stop_because)
        saver.wait()
        progress.flush()
        watchdog.at(steps, "writing the result")
        output.save_final(engine, watchdog)
        outcome = progress.outcome()
        outcome.out_of_patience = best.out_of_patience(recipe.eval.patience)
        return outcome


def make_evaluator(recipe: Recipe, data: Data, base: Path, watchdog: Watchdog) -> Evaluator | None:
    """None without evaluation data."""
    if data.eval is None:
        return None
    return Evaluator(data.eval, base, recipe.eval, recipe.batch.tokens_per_micro_batch, watchdog)


def evaluate(
    evaluator: Evaluator | None, engine: Engine, progress: Progress, step: int, best: BestLoss
) -> BestLoss:
    """Loss and sampled answers after `step` (a collective); the best loss since then."""
    assert evaluator is not None
    loss = evaluator.loss(engine, step)
    progress.evaluated(step, loss)
    progress.sampled(step, evaluator.samples(engine, step))
    return best.after(loss, step)


def train_step(
    recipe: Recipe,
    step: int,
    steps: int,
    data: Data,
    windows: WindowsAhead,
    engine: Engine,
    watchdog: Watchdog,
    profiler: StepProfiler,
) -> Step:
    """Optimizer step `step` (0-based) over all its micro-batches.

    A step without anything to learn leaves the weights alone: loss, targets and norm are 0.

    Raises:
        NotFinite: on every rank, with the rows that are to blame.
    """
    watchdog.at(step + 1, "reading the batch")
    with profiler.part("data"):
        window = windows.take(step)
    lr = lr_at(step, steps, recipe.optim)
    engine.set_lr(lr)
    loss = grad_norm = 0.0
    if window.targets:
        loss = accumulate(recipe, step, window, data.train, engine, watchdog, profiler)
        with profiler.part("optimizer"):
            grad_norm = update(step, window, data.train, engine)
    epoch = step // data.sampler.steps_per_epoch
    return Step(
        step + 1, epoch, loss, window.targets, lr, grad_norm, engine.overflows, window.statistics
    )


def accumulate(
    recipe: Recipe,
    step: int,
    window: Window,
    rows: TokenRows,
    engine: Engine,
    watchdog: Watchdog,
    profiler: StepProfiler,
) -> float:
    """Forward and backward over this rank's micro-batches; the loss sum of all ranks, which is finite."""
    world, rank = dist.world_size(), dist.rank()
    loss_sums: list[Tensor] = []
    for i, batch in enumerate(window.batches):
        torch.manual_seed(dropout_seed(recipe.seed, step, rank, i))
        watchdog.at(step + 1, f"micro-batch {i + 1} of {len(window.batches)}")
        with profiler.part("forward"):
            loss_sum = engine.loss_sum(batch.ids_BT, batch.labels_BT)
        # DeepSpeed averages gradients over the ranks. Answers differ in length, so a mean of the ranks' means would
        # let a rank with few learnt tokens weigh as much as one with many: the sum is divided by the whole step's
        # token count, and DeepSpeed's average is cancelled by `world`.
        # Without it test_gradient_does_not_depend_on_the_split fails.
        with profiler.part("backward"):
            engine.backward(
                loss_sum * (world / window.targets), last_of_step=i + 1 == len(window.batches)
            )
        loss_sums.append(loss_sum.detach())
    watchdog.at(step + 1, "updating the weights")
    values = torch.stack(
        loss_sums
    ).tolist()  # looked at only here, for the CPU would wait for the GPU each time
    bad_rows = [
        row
        for batch, value in zip(window.batches, values, strict=True)
        if not math.isfinite(value)
        for row in batch.row_ids
    ]
    loss, bad = dist.sum_floats(sum(values), len(bad_rows))
    if bad:  # on every rank, before the gradient can reach the weights
        not_finite("loss", "in", bad_alone(bad_rows, rows, engine), step, rows)
    return loss


def update(step: int, window: Window, rows: TokenRows, engine: Engine) -> float:
    """Apply the accumulated gradient; its norm before clipping."""
    all_rows = [row for batch in window.batches for row in batch.row_ids]
    try:
        result = engine.step()
    except FloatingPointError as error:
        not_finite(f"gradient ({error})", "among", all_rows, step, rows)
    if not result.applied and not engine.uses_loss_scale:  # ZeRO has skipped the update
        not_finite(f"gradient norm ({result.grad_norm})", "among", all_rows, step, rows)
    return result.grad_norm


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


def not_finite(what: str, where: str, row_ids: list[int], step: int, rows: TokenRows) -> NoReturn:
    """Raise NotFinite on every rank with the rows of all of them (a collective)."""
    texts = dist.gather_texts("\n".join(rows.source(row) for row in row_ids))
    sources = [source for text in texts for source in text.split("\n") if source]
    more = f" and {len(sources) - 4} more" if len(sources) > 4 else ""
    raise NotFinite(
        f"step {step + 1}: the {what} is not finite, {where} {', '.join(sources[:4])}{more}"
    )


def stop_not_finite(error: NotFinite, engine: Engine, saver: Saver, state: RunState) -> NoReturn:
    """End the run on every rank (a collective); the weights of the last good step are kept."""
    folder = saver.save(engine, state)
    kept = f"are kept in {folder}" if saver.wait() else "could not be saved"
    raise UserError(
        f"{error}; expected finite numbers (lower optim.lr, or look at those rows); the weights after step "
        f"{state.step} {kept}"
    ) from None


def stopped(progress: Progress, saver: Saver, why: str) -> Outcome:
    """The outcome of a run that was asked to stop, once the save is on the disk."""
    outcome = progress.outcome()
    outcome.stopped_by = why
    if not saver.wait():
        raise OSError(f"stopped by {why}, and step {outcome.steps} could not be saved")
    return outcome
