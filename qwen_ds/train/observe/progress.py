"""Progress of a run, written and shown: metrics.jsonl and the files beside it, the writers that get
the same numbers, the bar."""

from __future__ import annotations

import datetime
import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen_ds import dist
from qwen_ds.data.batches import WindowStatistics
from qwen_ds.page.html import duration
from qwen_ds.runlog import JsonLines, say
from qwen_ds.train.observe.evaluation import Sample
from qwen_ds.train.observe.metrics import Hardware, Step, metrics
from qwen_ds.train.observe.summary import RunSummary
from qwen_ds.train.observe.token_losses import RowLosses
from qwen_ds.train.observe.writers import Ending, Writers

log = logging.getLogger(__name__)

STEPS_UNTIL_ESTIMATE = 10


class Progress:
    """Record of the steps: a line of metrics every `log_every_steps`; only rank 0 writes.

    Leaving it closes the files.

    Args:
        steps: of the whole run.
        saved: `state` at the step after which a resumed run continues. Lines written after it are
            removed.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        log_every_steps: int,
        hardware: Hardware,
        writers: Writers,
        saved: dict[str, Any] | None = None,
    ) -> None:
        self._steps, self._every, self._hardware = steps, log_every_steps, hardware
        self._writers, self._writes = writers, dist.rank() == 0
        saved = saved or {"metrics_bytes": 0, "samples_bytes": 0, "pending": [], "outcome": {}}
        # Checkpoints of earlier releases have none.
        token_losses_bytes = saved.get("token_losses_bytes", 0)
        self.has_token_losses = token_losses_bytes > 0
        self._pending = [(_step(row), seconds) for row, seconds in saved["pending"]]
        self._summary = RunSummary(**saved["outcome"])
        self._first_step, self._seconds_before = self._summary.steps, self._summary.seconds
        if self._writes:
            self._lines = JsonLines(folder / "metrics.jsonl", saved["metrics_bytes"])
            self._samples = JsonLines(folder / "samples.jsonl", saved["samples_bytes"])
            self._token_losses = JsonLines(folder / "token_losses.jsonl", token_losses_bytes)
        # Into a log file the bar is drawn seldom: each redrawing adds to the file.
        self._bar = tqdm(
            total=steps, initial=self._first_step, unit="step", disable=not self._writes,
            mininterval=0.2 if sys.stderr.isatty() else 15.0, leave=False,
        )  # fmt: skip
        self._started = self._steps_began = self._step_started = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """State from which a resumed run writes the same lines; {} on ranks that write none."""
        if not self._writes:
            return {}
        return {
            "metrics_bytes": self._lines.position(),
            "samples_bytes": self._samples.position(),
            "token_losses_bytes": self._token_losses.position(),
            "pending": [[asdict(step), seconds] for step, seconds in self._pending],
            "outcome": asdict(self.summary()),
            "trackers": self._writers.known_as(),
        }

    def begin_step(self) -> None:
        self._step_started = time.perf_counter()
        if self._summary.steps == self._first_step:  # what came before it comes once: compilation
            self._steps_began = self._step_started

    def end_step(self, step: Step) -> None:
        """Take in a finished step; a step without target tokens is counted and not averaged."""
        log.info(
            "step %d of %d: loss sum %.6g over %d targets",
            step.number, self._steps, step.loss, step.targets,
        )  # fmt: skip
        summary = self._summary
        summary.steps, summary.overflows = step.number, step.overflows
        summary.tokens += step.window.tokens
        if step.targets:
            self._pending.append((step, time.perf_counter() - self._step_started))
        else:
            summary.skipped += 1
        if step.number % self._every == 0 or step.number == self._steps:
            self.flush()
        self._bar.update()
        if step.number == self._first_step + STEPS_UNTIL_ESTIMATE and step.number < self._steps:
            self._say_when_it_ends(step.number)

    def _say_when_it_ends(self, number: int) -> None:
        per_step = (time.perf_counter() - self._steps_began) / STEPS_UNTIL_ESTIMATE
        left = per_step * (self._steps - number)
        ends = datetime.datetime.now().astimezone() + datetime.timedelta(seconds=left)
        self._bar.clear()
        say(
            f"step {number} of {self._steps}; ends about {ends:%Y-%m-%d %H:%M %Z} "
            f"({duration(left)} left)"
        )

    def flush(self) -> None:
        """Write one line of metrics over the steps since the last line."""
        if not self._pending:
            return
        row = metrics(self._pending, self._hardware)
        self._summary.last_loss = row["loss"]
        if self._summary.first_loss is None:
            self._summary.first_loss = row["loss"]
        self._write(self._pending[-1][0].number, row, "train")
        self._bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
        self._pending = []

    def evaluated(self, step: int, loss: float) -> None:
        """Take in an evaluation loss (nats per target token)."""
        self._summary.eval_losses.append((step, loss))
        # JSON has neither NaN nor infinity; exp overflows above 709.
        perplexity = math.exp(loss) if loss < 700 else None
        row = {"eval_loss": loss if math.isfinite(loss) else None, "eval_perplexity": perplexity}
        self._write(step, row, "eval")

    def sampled(self, step: int, samples: Sequence[Sample]) -> None:
        """Take in the answers to a few rows."""
        if not self._writes:
            return
        for sample in samples:
            self._samples.write({"step": step, **asdict(sample)})
        self._writers.samples(step, samples)

    def measured(self, rows: Sequence[RowLosses]) -> None:
        """Take in the loss of each target token of a few rows."""
        if self._writes:
            for row in rows:
                self._token_losses.write(asdict(row))

    def summary(self) -> RunSummary:
        """The run so far."""
        self._summary.seconds = self._seconds_before + time.perf_counter() - self._started
        return self._summary

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()  # cleared, so that an error's line stands alone
        if self._writes:
            self._lines.close()
            self._samples.close()
            self._token_losses.close()
            self._writers.close(self._ending(failed=any(error)))

    def _write(self, step: int, row: dict[str, Any], group: str) -> None:
        if not self._writes:
            return
        self._lines.write({"step": step, **row})
        values = {
            f"{group}/{name.removeprefix('eval_')}": value
            for name, value in row.items()
            if value is not None
        }
        self._writers.numbers(step, values)

    def _ending(self, *, failed: bool) -> Ending:
        if failed:
            return "failed"
        return "stopped" if self._summary.stopped_by else "finished"


def _step(saved: dict[str, Any]) -> Step:
    return Step(**saved | {"window": WindowStatistics(**saved["window"])})
