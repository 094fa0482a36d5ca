"""The end of a command by a signal: an exception in its main thread, or else the process's end.

Python runs a signal's handler between two of its own instructions. A main thread that waits inside
C++, for a peer or for a disk, never comes to that. So the kernel also wakes a thread of this
module, which ends the process if it has not ended by itself.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from qwen_ds.terminal import show

# SIGINT: Ctrl-C. SIGTERM: launchers, Kubernetes, Slurm's time limit. SIGUSR1: the choice of Slurm's
# users for pre-emption. SIGHUP: the terminal is gone.
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# For the removal of half an output. A launcher kills its ranks 30 seconds after a signal.
GRACE_SECONDS = 20.0


class Stopped(KeyboardInterrupt):
    """A signal has asked this command to end. Libraries take it for Ctrl-C, and clean up."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.name = signal.Signals(number).name
        super().__init__(f"stopped by {self.name}")


@dataclass(slots=True)
class _Process:
    """The state of this process."""

    received: int | None = None  # the first signal, even if no handler could run yet
    ends: bool = False  # whether a signal ends the command
    grace_seconds: float = GRACE_SECONDS
    stopped_code: int | None = None
    speaks: bool = True


_process = _Process()


def received() -> int | None:
    """The first signal of SIGNALS that has come, even if no handler could run yet."""
    return _process.received


def ending() -> int | None:
    """The signal that ends this command now; None where the command stops at its own time."""
    return _process.received if _process.ends else None


def last_words(number: int) -> int:
    """Say which signal has ended the command, once; returns the exit code."""
    if _process.speaks:
        _process.speaks = False
        show(Stopped(number), err=True)
    if _process.stopped_code is None or number == signal.SIGINT:
        return 128 + number
    return _process.stopped_code


def handle(action: Callable[[int], None] | None) -> None:
    """Call `action` at each signal from now on; None: ignore them.

    A signal that was ignored when the process began stays ignored: that is what nohup asks for.
    """

    def handler(number: int, frame: FrameType | None) -> None:
        assert action is not None
        action(number)

    _process.ends = False
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_IGN if action is None else handler)


@contextmanager
def raised(stopped_code: int | None, *, speaks: bool) -> Iterator[None]:
    """Raise Stopped in the block at the first signal; later ones do not disturb the cleaning up.

    A process that is still there GRACE_SECONDS later is ended.

    Args:
        stopped_code: the exit code after any signal but Ctrl-C; None, and after Ctrl-C: 128 + the
            signal's number, as a shell has it.
        speaks: whether this process says that a signal has ended it; one of all ranks does.
    """

    def stop(number: int) -> None:
        handle(None)
        _process.ends, _process.received = True, number
        raise Stopped(number)

    kept = {number: signal.getsignal(number) for number in SIGNALS}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # A signal to a forked child would be written into our pipe.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    handle(stop)
    _process.received, _process.ends = None, True
    _process.stopped_code, _process.speaks = stopped_code, speaks
    threading.Thread(target=_listen, args=(reader,), name="signals", daemon=True).start()
    try:
        yield
    finally:
        if _process.received is None:  # else the listener stays, in case the end itself hangs
            signal.set_wakeup_fd(-1)
            os.close(writer)
            for number, handler in kept.items():
                signal.signal(number, handler)


@contextmanager
def at_once() -> Iterator[None]:
    """Give the main thread no time to end: it waits for others here, and has nothing to clean."""
    _process.grace_seconds = 1.0
    try:
        yield
    finally:
        _process.grace_seconds = GRACE_SECONDS


def _listen(reader: int) -> None:
    """Record each signal as it comes, and give the main thread its time to end."""
    while came := os.read(reader, 1):
        number = came[0]
        if number not in SIGNALS:
            continue
        if _process.received is None:
            _process.received = number
        if _process.ends:
            began = time.monotonic()
            while time.monotonic() - began < _process.grace_seconds:
                time.sleep(0.1)
            os._exit(last_words(number))
