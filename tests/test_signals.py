"""Signals: one line, a promised exit code, nothing left, wherever the main thread is."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from qwen_ds import signals
from qwen_ds.disk.write import replacing
from qwen_ds.runlog import run_command
from tests.jobs import fork


def sleep(place: Path) -> None:
    time.sleep(60)


def clean_up_slowly(place: Path) -> None:
    try:
        time.sleep(60)
    finally:
        (place / "cleaning").touch()
        time.sleep(0.5)
        (place / "cleaned").touch()


def lose_the_exception(place: Path) -> None:
    """As a main thread does that waits in C++, where no handler runs."""
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)


def turn_it_into_another(place: Path) -> None:
    """The library's error comes before the exception of the handler, or instead of it."""
    try:
        time.sleep(60)
    except BaseException:
        raise RuntimeError("a pool is broken") from None


def rest(place: Path) -> None:
    time.sleep(0.5)


def fork_and_signal_the_child(place: Path) -> None:
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
        (place / "child").touch()
        time.sleep(60)
    while not (place / "child").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    os.waitpid(child, 0)
    time.sleep(0.3)
    assert signals.received() is None


def command(
    body: Callable[[Path], None], place: Path, code: int | None, ignored: signal.Signals | None
) -> None:
    """In the child: a command with half an output, which then does `body`."""
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))
    signals.GRACE_SECONDS = signals._process.grace_seconds = 1.0
    if ignored is not None:
        signal.signal(ignored, signal.SIG_IGN)

    def main() -> None:
        with replacing(place / "output") as unfinished:
            unfinished.write_text("half")
            (place / "ready").touch()
            body(place)

    run_command(main, stopped_code=code)


class Running:
    """A command in a child that has got as far as its body."""

    def __init__(
        self,
        body: Callable[[Path], None],
        place: Path,
        code: int | None = None,
        ignored: signal.Signals | None = None,
    ) -> None:
        self.place = place
        self.process: ForkServerProcess = fork(command, body, place, code, ignored)
        self.until("ready")

    def until(self, name: str) -> None:
        ends = time.monotonic() + 60
        while not (self.place / name).exists():
            assert time.monotonic() < ends and self.process.is_alive(), self.err
            time.sleep(0.01)

    def send(self, *numbers: signal.Signals) -> None:
        assert self.process.pid is not None
        for number in numbers:
            os.kill(self.process.pid, number)

    def ended(self) -> tuple[int | None, str]:
        self.process.join(60)
        self.process.kill()
        return self.process.exitcode, self.err

    @property
    def err(self) -> str:
        return (self.place / "err").read_text()

    @property
    def left(self) -> set[str]:
        return {path.name for path in self.place.iterdir()} - {"out", "err", "ready"}


@pytest.mark.parametrize(
    ("number", "code", "ends_with"),
    [
        (signal.SIGINT, None, 130),
        (signal.SIGTERM, None, 143),
        (signal.SIGHUP, None, 129),
        (signal.SIGUSR1, 3, 3),
        (signal.SIGINT, 3, 130),
    ],
)
def test_one_line_the_shells_code_and_no_half_output(
    number: signal.Signals, code: int | None, ends_with: int, tmp_path: Path
) -> None:
    running = Running(sleep, tmp_path, code)
    running.send(number)
    assert running.ended() == (ends_with, f"stopped by {number.name}\n") and not running.left


def test_a_second_signal_does_not_disturb_the_cleaning(tmp_path: Path) -> None:
    running = Running(clean_up_slowly, tmp_path)
    running.send(signal.SIGTERM)
    running.until("cleaning")
    running.send(signal.SIGTERM, signal.SIGINT)
    assert running.ended() == (143, "stopped by SIGTERM\n")
    assert running.left == {"cleaning", "cleaned"}


def test_a_main_thread_that_never_comes_back_is_ended(tmp_path: Path) -> None:
    running = Running(lose_the_exception, tmp_path)
    running.send(signal.SIGTERM)
    assert running.ended() == (143, "stopped by SIGTERM\n")


def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    running = Running(rest, tmp_path, ignored=signal.SIGHUP)
    running.send(signal.SIGHUP)
    assert running.ended() == (0, "") and running.left == {"output"}


def test_a_worker_that_dies_of_the_same_signal_is_no_failure(tmp_path: Path) -> None:
    running = Running(turn_it_into_another, tmp_path)
    running.send(signal.SIGTERM)
    assert running.ended() == (143, "stopped by SIGTERM\n")


def test_a_signal_of_a_forked_child_is_not_ours(tmp_path: Path) -> None:
    assert Running(fork_and_signal_the_child, tmp_path).ended() == (0, "")
