"""The one connection from the training loop to all that watch it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from qwen_ds.train.observe.metrics import Step
from qwen_ds.train.observe.profiler import StepProfiler
from qwen_ds.train.observe.progress import Progress
from qwen_ds.train.survive.watchdog import Watchdog


@dataclass(frozen=True, slots=True)
class Observer:
    """Relay of the training's position to the watchdog, the profiler and the progress.

    Nothing here is a collective, and none of the three changes a number. Leaving it closes the
    metrics files.
    """

    watchdog: Watchdog
    profiler: StepProfiler
    progress: Progress

    def at(self, step: int, doing: str) -> None:
        """Report what all ranks do next, in the same order; the watchdog's verdicts quote it."""
        self.watchdog.at(step, doing)

    def part(self, name: str) -> AbstractContextManager[None]:
        """Attribute the time of the block to one of profiler.PARTS, in steps that are profiled."""
        return self.profiler.part(name)

    def begin_step(self, number: int) -> None:
        """Start the clocks of optimizer step `number` (1-based)."""
        self.progress.begin_step()
        self.profiler.begin_step(number)

    def end_step(self, step: Step) -> None:
        self.profiler.end_step(step.number)
        self.progress.end_step(step)

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.__exit__(*error)
