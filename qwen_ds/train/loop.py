"""The training loop: one iteration per optimizer step, every collective visible.

Shapes: B rows of a micro-batch, T its longest row.
"""

from __future__ import annotations

import logging
import math
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from qwen_ds import dist
from qwen_ds.config import Recipe
from qwen_ds.data.batches import evaluation_batches
from qwen_ds.data.rows import TokenRows
from qwen_ds.errors import UserError
from qwen_ds.runlog import JsonLines, is_terminal
from qwen_ds.train.engine import Engine
from qwen_ds.train.output import Output
from qwen_ds.train.schedule import lr_at
from qwen_ds.train.setup import Data

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Totals:
    """Sums over the steps since the last metrics line, all ranks together."""

    loss: float = 0.0
    targets: int = 0
    tokens: int = 0
    padded: int = 0
    seconds: float = 0.0
    imbalance: float = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run has to tell."""

    steps: int
    first_loss: float
    last_loss: float
    eval_losses: list[tuple[int, float]]
    seconds: float
    tokens: int
    skipped_without_targets: int
    overflows: int


@dataclass(slots=True)
class Journal:
    """metrics.jsonl and TensorBoard, written by rank 0 only."""

    folder: Path
    lines: JsonLines | None = field(init=False, default=None)
    board: SummaryWriter | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if dist.rank() == 0:
            self.lines = JsonLines(self.folder / "metrics.jsonl")
            self.board = SummaryWriter(str(self.folder / "tensorboard"))

    def write(self, step: int, row: dict[str, Any], group: str) -> None:
        if self.lines is None or self.board is None:
            return
        self.lines.write({"step": step, **row})
        for name, value in row.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(f"{group}/{name.removeprefix('eval_')}", value, step)
        self.board.flush()

    def close(self) -> None:
        if self.lines is not None and self.board is not None:
            self.lines.close()
            self.board.close()


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
    world, rank = dist.world_size(), dist.rank()
    steps_per_epoch = data.sampler.steps_per_epoch
    steps = total_steps(recipe, steps_per_epoch)
    eval_every = recipe.eval.every_steps or steps_per_epoch
    journal = Journal(output.folder)
    totals, started = Totals(), time.perf_counter()
    all_tokens, skipped, overflows = 0, 0, 0
    losses: list[float] = []
    eval_losses: list[tuple[int, float]] = []
    bar = tqdm(total=steps, unit="step", disable=rank != 0, mininterval=0.2 if is_terminal() else 15, leave=False)

    engine.train(True)
    for step in range(steps):
        step_started = time.perf_counter()
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        window = data.sampler.window(epoch, step_in_epoch)
        statistics = data.sampler.statistics(epoch, step_in_epoch)
        (targets,) = dist.sum_floats(sum(batch.num_targets for batch in window))
        if targets == 0:
            log.warning("step %d has nothing to learn and is skipped", step + 1)
            skipped += 1
            continue
        lr = lr_at(step, steps, recipe.optim)
        engine.set_lr(lr)

        window_loss, bad_rows = 0.0, []
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
        loss_total, bad = dist.sum_floats(window_loss, len(bad_rows))
        if bad or not math.isfinite(loss_total):
            stop_at_bad_loss(data.train, bad_rows, step, output, engine)
        result = engine.step()
        if not result.applied:
            if not engine.uses_loss_scale:
                rows = [row for batch in window for row in batch.row_ids]
                stop_at_bad_gradient(data.train, rows, result.grad_norm, step, output, engine)
            overflows += 1
            log.info("step %d: fp16 overflow, skipped; the loss scale is now %g", step + 1, engine.loss_scale())

        totals.loss += loss_total
        totals.targets += int(targets)
        totals.tokens += statistics.tokens
        totals.padded += statistics.padded_tokens
        totals.imbalance = max(totals.imbalance, statistics.imbalance)
        totals.seconds += time.perf_counter() - step_started
        all_tokens += statistics.tokens
        done = step + 1
        if done % recipe.log.every_steps == 0 or done == steps:
            losses.append(totals.loss / totals.targets)
            journal.write(done, metrics(totals, epoch, lr, result.grad_norm, overflows), "train")
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            totals = Totals()
        bar.update()
        if data.eval is not None and (done % eval_every == 0 or done == steps):
            loss = evaluation_loss(engine, data.eval, recipe.batch.tokens_per_micro_batch)
            eval_losses.append((done, loss))
            journal.write(done, {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}, "eval")
        if done % recipe.save.every_steps == 0 and done < steps:
            output.save_step(engine, done, recipe.save.keep)
    bar.close()
    output.save_final(engine)
    journal.close()
    return Outcome(
        steps, losses[0] if losses else math.nan, losses[-1] if losses else math.nan, eval_losses,
        time.perf_counter() - started, all_tokens, skipped, overflows,
    )  # fmt: skip


def metrics(totals: Totals, epoch: int, lr: float, grad_norm: float, overflows: int) -> dict[str, Any]:
    """One line of metrics. Tokens are real ones of all ranks, never padding; loss is per learnt token, in nats."""
    seconds = max(totals.seconds, 1e-9)
    return {
        "epoch": epoch,
        "loss": totals.loss / totals.targets,
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens_per_second": totals.tokens / seconds,
        "learnt_tokens_per_second": totals.targets / seconds,
        "padding_share": 1.0 - totals.tokens / totals.padded,
        "rank_imbalance": totals.imbalance,
        "memory_gb": peak_memory_gb(),
        "seconds": totals.seconds,
        **({"fp16_overflows": overflows} if overflows else {}),
    }


def peak_memory_gb() -> float:
    """Largest memory of this rank so far, in 10^9 bytes: of the GPU where there is one, else of the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@torch.no_grad()
def evaluation_loss(engine: Engine, rows: TokenRows, tokens_per_micro_batch: int) -> float:
    """Loss per learnt token over all rows, by the training formula (no NTK, no LogN), dropout off."""
    engine.train(True)
    dropouts = [m for m in engine.model.modules() if isinstance(m, torch.nn.Dropout)]
    # The model stays in training mode, in which NTK and LogN don't act; only its dropouts are switched off.
    for dropout in dropouts:
        dropout.eval()
    loss = targets = 0.0
    for batch in evaluation_batches(rows, dist.world_size(), dist.rank(), tokens_per_micro_batch):
        loss += engine.loss_sum(batch.ids_BT, batch.labels_BT).item()
        targets += batch.num_targets
    loss, targets = dist.sum_floats(loss, targets)
    engine.train(True)
    return loss / max(targets, 1.0)


def stop_at_bad_loss(rows: TokenRows, bad_rows: list[int], step: int, output: Output, engine: Engine) -> None:
    """End the run on every rank, before the gradient touches the weights."""
    sources = [s for text in dist.gather_texts("\n".join(rows.source(r) for r in bad_rows)) for s in text.split("\n") if s]
    _stop("loss", f"in {_shorten(sources)}", step, output, engine)


def stop_at_bad_gradient(
    rows: TokenRows, window_rows: list[int], norm: float, step: int, output: Output, engine: Engine
) -> None:
    """End the run on every rank; DeepSpeed has skipped the update."""
    sources = [s for text in dist.gather_texts("\n".join(rows.source(r) for r in window_rows)) for s in text.split("\n") if s]
    _stop(f"gradient norm ({norm})", f"among {_shorten(sources)}", step, output, engine)


def _stop(what: str, where: str, step: int, output: Output, engine: Engine) -> None:
    kept = output.save_step(engine, step, keep=10**6)
    raise UserError(
        f"step {step + 1}: the {what} is not finite, {where}; expected finite numbers (lower optim.lr, or look at those "
        f"rows); the weights after step {step} are kept in {kept}"
    )


def _shorten(sources: list[str], most: int = 4) -> str:
    more = f" and {len(sources) - most} more" if len(sources) > most else ""
    return ", ".join(sources[:most]) + more


def describe(outcome: Outcome) -> str:
    """The summary in words."""
    text = (
        f"{outcome.steps} steps in {outcome.seconds:.0f} s, {outcome.tokens / max(outcome.seconds, 1e-9):,.0f} tokens/s; "
        f"loss {outcome.first_loss:.3f} -> {outcome.last_loss:.3f}"
    )
    if outcome.eval_losses:
        text += f"; evaluation loss {outcome.eval_losses[-1][1]:.3f}"
    if outcome.skipped_without_targets:
        text += f"; {outcome.skipped_without_targets} steps had nothing to learn"
    if outcome.overflows:
        text += f"; {outcome.overflows} fp16 overflows"
    return text

