"""Requests to stop: by a signal, or by the time limit of the job around the run."""

from __future__ import annotations

import signal
import time

from qwen_ds import dist, signals

_TIME_LIMIT = 1000.0  # above every signal's number, and so the maximum over the ranks


class StopRequest:
    """A request to stop: signals while it is entered, or a deadline; the ranks agree on the step.

    A launcher forwards a signal to one rank after the other, seconds apart, and may reach only
    some: the handler merely notes it, and all ranks hear of it with each step's totals and during
    an evaluation. Before the training a signal ends the process (qwen_ds/signals.py).

    Args:
        ends_at: when the job is killed (seconds since 1970), or None.
        before_minutes: how long before that to stop.
    """

    def __init__(self, ends_at: float | None, before_minutes: float) -> None:
        self._deadline = float("inf") if ends_at is None else ends_at - 60 * before_minutes
        self._received = 0

    def noted(self) -> float:
        """This rank's request, 0 for none: the largest of all ranks' goes to `reason`."""
        return float(self._received) or (_TIME_LIMIT if time.time() > self._deadline else 0.0)

    @staticmethod
    def reason(noted: float) -> str | None:
        """Why to stop, by the largest of the ranks' `noted`, or None."""
        if noted == _TIME_LIMIT:
            return "the job's time limit is near (save.before_minutes)"
        return signal.Signals(int(noted)).name if noted else None

    def agreed(self) -> str | None:
        """Why to stop now, the same on every rank, or None (a collective)."""
        return self.reason(dist.max_floats(self.noted())[0])

    def __enter__(self) -> StopRequest:
        signals.handle(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        """Ignore signals from here on: only the short end of the run is left."""
        signals.handle(None)

    def _note(self, number: int) -> None:
        self._received = number
