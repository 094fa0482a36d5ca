"""The next step's micro-batches are made while the present one trains.

A thread is enough: of a step of 128 rows the work is some milliseconds, much of it without Python's lock, and what it
makes is there at once, in the memory that a GPU copies from. What comes is still a pure function of (epoch, step): a
run that starts or resumes anywhere sees the same batches.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from qwen_ds.data.batches import Batch, Rows, StepSampler, WindowStatistics
from qwen_ds.model.chatml import IGNORE


@dataclass(frozen=True, slots=True)
class Window:
    """What one rank needs for one optimizer step."""

    batches: list[Batch]
    """Its micro-batches."""
    targets: int
    """Labels that count, of all ranks: every rank has all rows at hand, so none needs to ask the others."""
    statistics: WindowStatistics


class WindowsAhead:
    """Windows in the order of the steps, each made while the one before is in use.

    Args:
        steps: of the whole run.
        pinned: put the tensors into page-locked memory, from which a GPU copies by itself while the CPU goes on.
    """

    def __init__(self, sampler: StepSampler, steps: int, *, pinned: bool) -> None:
        self._sampler, self._steps, self._pinned = sampler, steps, pinned
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[int, Future[Window]] | None = None

    def __enter__(self) -> WindowsAhead:
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.shutdown(cancel_futures=True)

    def take(self, step: int) -> Window:
        """The window of optimizer step `step` (0-based); an error of its making is raised here."""
        known = self._next
        future = known[1] if known and known[0] == step else self._worker.submit(self._make, step)
        window = future.result()
        self._next = (
            (step + 1, self._worker.submit(self._make, step + 1))
            if step + 1 < self._steps
            else None
        )
        return window

    def _make(self, step: int) -> Window:
        sampler = self._sampler
        position = divmod(step, sampler.steps_per_epoch)
        batches = sampler.window(*position)
        if self._pinned:
            batches = [
                replace(
                    batch, ids_BT=batch.ids_BT.pin_memory(), labels_BT=batch.labels_BT.pin_memory()
                )
                for batch in batches
            ]
        return Window(
            batches,
            num_targets(sampler.rows, sampler.step_rows(*position)),
            sampler.statistics(*position),
        )


def num_targets(rows: Rows, row_ids: np.ndarray) -> int:
    """Labels of these rows that count: those left after the shift by one."""
    return sum(int((rows[row][1][1:] != IGNORE).sum()) for row in row_ids.tolist())
