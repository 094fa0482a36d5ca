"""The interface to all that gets a run's numbers beside metrics.jsonl, and its failures kept away
from the training.

Shapes: N rows.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from qwen_ds.recipe.loading import to_dict
from qwen_ds.recipe.options import Recipe
from qwen_ds.runlog import say
from qwen_ds.train.observe.evaluation import Sample

PROJECT = "qwen-ds"  # of runs whose project nobody has named
Ending = Literal["finished", "stopped", "failed"]
Settings = dict[str, bool | int | float | str]
MAX_WAITING = 10_000  # calls that a tracker has not taken yet
# Time in which most trackers have begun: then their lines come before the first step, and even the
# first checkpoint knows their ids.
SECONDS_TO_START = 5.0
# Time for a tracker to take the rest. A stopped run may be killed soon.
SECONDS_AT_END: Mapping[Ending, float] = {"finished": 60.0, "stopped": 5.0, "failed": 5.0}
# Keys and sections of a recipe that change no number, and names of files.
_LEFT_OUT = (
    "output_dir", "dry_run", "device", "deepspeed", "log", "save", "resume", "distributed",
    "data.cache_dir", "model.memory_gb", "lora.allow_pickle", "lora.init_from", "batch.rehearse",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """A run as its trackers know it."""

    folder: Path
    project: str | None  # None: as the tracker's own variables and files have it, or PROJECT
    name: str
    settings: Settings
    first_step: int  # steps behind it as it begins or resumes
    known_as: Mapping[str, str]
    """Its id in each tracker, from before it resumed."""


class Writer(Protocol):
    """TensorBoard's files, or a run of a tracker. Made on rank 0 alone.

    It is called from one thread, `start` first and `close` last. Any of its methods may raise: it
    is then given up.
    """

    @property
    def run_id(self) -> str | None:
        """By which a resumed run continues it; None while it is unknown, or where it needs none."""
        ...

    def start(self) -> str:
        """Begin or continue the run; returns where it is to be seen, in words, or ""."""
        ...

    def lengths(self, values: Mapping[str, np.ndarray]) -> None:
        """Take in the lengths [N] of all rows by their tags, such as data/tokens; once."""
        ...

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Take in numbers of metrics.jsonl by their tags, such as train/loss."""
        ...

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Take in the answers to a few rows."""
        ...

    def close(self, ending: Ending) -> None: ...


class Guarded:
    """A writer whose failure ends its own curve, with one line, and never the training."""

    def __init__(self, name: str, make: Callable[[], Writer], known_as: str | None = None) -> None:
        self.name, self.run_id = name, known_as
        self._writer: Writer | None = None
        try:
            self._writer = make()
        except Exception as error:
            self._say_why(error)
        self.call(self._start)

    def call(self, action: Callable[[Writer], object]) -> None:
        """Let the writer do something, unless it has been given up."""
        if (writer := self._writer) is not None:
            try:
                action(writer)
                self.run_id = writer.run_id or self.run_id
            except Exception as error:
                self._give_up(error)

    def close(self, ending: Ending) -> None:
        self.call(lambda writer: writer.close(ending))

    def _start(self, writer: Writer) -> None:
        if place := writer.start():
            say(f"{self.name}: {place}")

    def _give_up(self, error: Exception) -> None:
        if self._writer is not None:
            self._writer = None
            self._say_why(error)

    def _say_why(self, error: Exception) -> None:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        say(f"{self.name} is given up, and the training goes on: {reason}")


class InBackground(Guarded):
    """A guarded writer in a thread of its own: a slow network never holds up the training."""

    def __init__(self, name: str, make: Callable[[], Writer], known_as: str | None = None) -> None:
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(MAX_WAITING)
        # A daemon: one that hangs in a library does not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()
        super().__init__(name, make, known_as)
        self._started = threading.Event()
        self._waiting.put(self._started.set)
        self._started.wait(SECONDS_TO_START)

    def call(self, action: Callable[[Writer], object]) -> None:
        try:
            self._waiting.put_nowait(lambda: Guarded.call(self, action))
        except queue.Full:
            self._give_up(TimeoutError(f"it has not taken {MAX_WAITING:,} lines"))

    def close(self, ending: Ending) -> None:
        super().close(ending)
        # Not for one that has not even begun.
        seconds = SECONDS_AT_END[ending] if self._started.is_set() else SECONDS_TO_START
        try:
            self._waiting.put(None, timeout=seconds)
            self._thread.join(seconds)
        except queue.Full:
            pass
        if self._thread.is_alive():
            say(f"{self.name} has not taken everything in {seconds:g} s; the rest is lost")

    def _work(self) -> None:
        while (action := self._waiting.get()) is not None:
            action()


class Writers:
    """All writers of a run; none on ranks other than 0."""

    def __init__(self, writers: Sequence[Guarded] = ()) -> None:
        self._writers = writers

    def lengths(self, tokens_N: np.ndarray, targets_N: np.ndarray) -> None:
        values = {"data/tokens": tokens_N, "data/target_tokens": targets_N}
        for each in self._writers:
            each.call(lambda writer: writer.lengths(values))

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for each in self._writers:
            each.call(lambda writer: writer.numbers(step, values))

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        for each in self._writers:
            each.call(lambda writer: writer.samples(step, samples))

    def close(self, ending: Ending) -> None:
        for each in self._writers:
            each.close(ending)

    def known_as(self) -> dict[str, str]:
        """The ids that a resumed run continues by, as far as they are known."""
        return {each.name: each.run_id for each in self._writers if each.run_id is not None}


def settings_of(recipe: Recipe, ranks: int, zero_stage: int) -> Settings:
    """The keys of a recipe that decide its numbers, flat and plain; unset ones are left out."""
    found: Settings = {}

    def add(prefix: str, values: Mapping[str, object]) -> None:
        for key, value in values.items():
            name = prefix + key
            if name in _LEFT_OUT or value is None or value in ([], {}):
                continue
            if isinstance(value, dict) and not prefix:
                add(f"{name}.", value)
            elif isinstance(value, list | tuple):
                found[name] = ", ".join(map(str, value))
            elif isinstance(value, bool | int | float):
                # Options with a range are of subclasses, which some trackers do not know.
                found[name] = next(k(value) for k in (bool, int, float) if isinstance(value, k))
            else:
                found[name] = str(value)

    asked = to_dict(recipe)
    if recipe.method != "lora":
        del asked["lora"]
    add("", asked)
    return found | {"ranks": ranks, "zero_stage": zero_stage}
