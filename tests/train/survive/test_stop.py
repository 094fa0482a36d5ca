"""Requests to stop: any rank's signal, or the job's clock, stops all of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from qwen_ds import dist
from qwen_ds.signals import SIGNALS
from qwen_ds.train.survive.stop import StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What another rank has received."""
    received = [0.0]
    monkeypatch.setattr(dist, "max_floats", lambda own: [max(own, *received)])
    return received


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_told_at_the_next_step(
    number: signal.Signals, others: list[float]
) -> None:
    with StopRequest(None, 10) as request:
        assert request.agreed() is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # a repeated one changes nothing
        assert request.agreed() == number.name
    assert signal.getsignal(number) is signal.SIG_IGN, "the short end of the run is not disturbed"


def test_a_signal_of_another_rank_stops_this_one(others: list[float]) -> None:
    others[0] = float(signal.SIGTERM)
    assert StopRequest(None, 10).agreed() == "SIGTERM"


def test_the_jobs_clock_stops_the_run_in_time(others: list[float]) -> None:
    assert StopRequest(time.time() + 660, 10).agreed() is None
    assert StopRequest(time.time() + 590, 10).agreed() == (
        "the job's time limit is near (save.before_minutes)"
    )
