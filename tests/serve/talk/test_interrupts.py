"""Ctrl-C: raised where a wait may be long, found later elsewhere, never lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from qwen_ds.signals import SIGNALS, Stopped
from serve.talk.interrupts import Interrupts


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    kept = {number: signal.getsignal(number) for number in SIGNALS}
    found = Interrupts()
    with found.handled():
        yield found
    for number, handler in kept.items():
        signal.signal(number, handler)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_it_interrupts_a_wait_and_nothing_else(interrupts: Interrupts) -> None:
    ctrl_c()
    assert interrupts.came and interrupts.take() and not interrupts.came
    with pytest.raises(KeyboardInterrupt), interrupts.waiting():
        ctrl_c()
    assert interrupts.take()
    ctrl_c()  # outside again
    assert interrupts.take()
    with interrupts.waiting():
        pass
    assert not interrupts.take()


def test_one_that_came_before_the_wait_is_not_lost(interrupts: Interrupts) -> None:
    ctrl_c()
    with pytest.raises(KeyboardInterrupt), interrupts.waiting():
        pytest.fail("waited")


def test_other_signals_end_the_command(interrupts: Interrupts) -> None:
    with pytest.raises(Stopped, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
