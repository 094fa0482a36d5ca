"""Prefetching: the next step's micro-batches are read and padded while the present step trains.

A thread is enough: for a step of 128 rows the work takes some milliseconds, much of it without
Python's lock, and unlike a process it fills the memory that a GPU copies from. The windows remain a
pure function of (epoch, step): a run that starts or resumes anywhere sees the same batches.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from qwen_ds.data.batches import Batch, StepSampler, WindowStatistics


@dataclass(frozen=True, slots=True)
class Window:
    """The work of one rank in one optimizer step."""

    batches: list[Batch]
    targets: int
    """Target tokens of all ranks. Every rank knows all rows, so this takes no collective."""
    statistics: WindowStatistics


class WindowsAhead:
    """Windows of the whole run's `steps`, in order, each made while the one before is in use.

    `pinned` puts their tensors into page-locked memory, from which a GPU can copy asynchronously.
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
        """The window of optimizer step `step` (0-based). An error from making it is raised here."""
        known = self._next
        future = known[1] if known and known[0] == step else self._worker.submit(self._make, step)
        window = future.result()
        self._next = None
        if step + 1 < self._steps:
            self._next = step + 1, self._worker.submit(self._make, step + 1)
        return window

    def _make(self, step: int) -> Window:
        sampler = self._sampler
        position = divmod(step, sampler.steps_per_epoch)
        batches = sampler.window(*position)
        if self._pinned:
            batches = [batch.pinned() for batch in batches]
        targets = int(sampler.rows.learnt[sampler.step_rows(*position)].sum())
        return Window(batches, targets, sampler.statistics(*position))
