"""The end of a run whose loss or gradient is not finite: the rows to blame, the weights kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from qwen_ds import dist
from qwen_ds.data.batches import Batch, make_batch
from qwen_ds.data.rows.token_rows import TokenRows
from qwen_ds.errors import UserError
from qwen_ds.train.engine.engine import TrainingEngine
from qwen_ds.train.survive.checkpoint_writer import RunState, Saver


class NotFinite(ArithmeticError):
    """The loss or the gradient is not finite; raised on every rank, before the weights change."""


def bad_rows(
    batches: Sequence[Batch],
    loss_sums: Sequence[Tensor],
    rows: TokenRows,
    engine: TrainingEngine,
) -> list[int]:
    """This rank's rows that are to blame for losses that are not finite (a collective, once)."""
    values = torch.stack(list(loss_sums)).tolist()
    pairs = zip(batches, values, strict=True)
    bad = [row for batch, value in pairs if not math.isfinite(value) for row in batch.row_ids]
    return bad_alone(bad, rows, engine)


@torch.no_grad()
def bad_alone(row_ids: list[int], rows: TokenRows, engine: TrainingEngine) -> list[int]:
    """The rows whose loss is not finite by themselves, or else all of them (a collective)."""
    # All ranks make the same number of forward passes: under ZeRO-3 each gathers the weights.
    count = int(dist.max_floats(len(row_ids))[0])
    found: list[int] = []
    for i in range(count):
        batch = make_batch(rows, np.array(row_ids[i : i + 1], dtype=np.int64))
        loss_sum = engine.loss_sum(batch.ids_BT, batch.labels_BT, batch.places_P)
        if not math.isfinite(loss_sum.item()):
            found += batch.row_ids
    return found or row_ids


def raise_not_finite(step: int, problem: str, row_ids: list[int], rows: TokenRows) -> NoReturn:
    """Raise NotFinite on every rank, with the sources of all ranks' rows (a collective).

    `problem` is the sentence up to the rows ("loss is not finite, in"); `row_ids` are this rank's.
    """
    gathered = dist.gather([rows.source(row) for row in row_ids])
    sources = [source for of_rank in gathered for source in of_rank]
    more = f" and {len(sources) - 4} more" if len(sources) > 4 else ""
    raise NotFinite(f"step {step}: the {problem} {', '.join(sources[:4])}{more}")


def stop_not_finite(
    error: NotFinite, engine: TrainingEngine, saver: Saver, state: RunState
) -> NoReturn:
    """Keep the weights of the last good step and end the run on every rank (a collective)."""
    folder = saver.save(engine, state)
    kept = f"are kept in {folder}" if saver.wait() else "could not be saved"
    raise UserError(
        f"{error}; expected finite numbers (lower optim.lr, or look at those rows); the weights "
        f"after step {state.step} {kept}"
    ) from None
