"""Being asked to stop: by a signal, or by the clock of the job that we run in."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType

from qwen_ds import dist
from qwen_ds.errors import EXIT_STOPPED

# SIGINT: Ctrl-C. SIGTERM: launchers, Kubernetes, Slurm's time limit. SIGUSR1: what Slurm users choose for pre-emption.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_TIME_LIMIT = 1000.0  # above every signal's number


def leave_at_signals() -> None:
    """Until the training begins there is nothing to save: SIGTERM and SIGUSR1 end the process at once, with the exit
    code that says that the same command goes on. Ctrl-C stays Python's."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: os._exit(EXIT_STOPPED))


class StopRequest:
    """Takes signals in while it is entered, and lets the ranks agree on the step after which they stop.

    A launcher forwards a signal to one rank after the other, seconds apart, and may reach only some: the handler merely
    notes it, and `agreed` asks all ranks at the end of each step. A signal that comes again changes nothing.

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
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """From here on signals are ignored: what follows is the end of the run, and it is short."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
