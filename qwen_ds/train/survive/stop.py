"""Requests to stop: by a signal, or by the time limit of the job around the run."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from qwen_ds import dist
from qwen_ds.errors import EXIT_STOPPED

# SIGINT: Ctrl-C. SIGTERM: launchers, Kubernetes, Slurm's time limit. SIGUSR1: the choice of Slurm's
# users for pre-emption.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_TIME_LIMIT = 1000.0  # above every signal's number, and so the maximum over the ranks


def leave_at_signals() -> None:
    """Let SIGTERM and SIGUSR1 end the process at once, for the time before the training.

    There is nothing to save yet. The exit code says that the same command resumes; Ctrl-C stays
    Python's.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: os._exit(EXIT_STOPPED))


class StopRequest:
    """A request to stop: signals while it is entered, or a deadline; the ranks agree on the step.

    A launcher forwards a signal to one rank after the other, seconds apart, and may reach only
    some: the handler merely notes it, and `agreed` asks all ranks at the end of each step.

    Args:
        ends_at: when the job is killed (seconds since 1970), or None.
        before_minutes: how long before that to stop.
    """

    def __init__(self, ends_at: float | None, before_minutes: float) -> None:
        self._deadline = float("inf") if ends_at is None else ends_at - 60 * before_minutes
        self._received = 0

    def agreed(self) -> str | None:
        """Why to stop now, the same on every rank, or None (a collective)."""
        own = float(self._received) or (_TIME_LIMIT if time.time() > self._deadline else 0.0)
        code = dist.max_floats(own)[0]
        if code == _TIME_LIMIT:
            return "the job's time limit is near (save.before_minutes)"
        return signal.Signals(int(code)).name if code else None

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        """Ignore signals from here on: only the short end of the run is left."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
