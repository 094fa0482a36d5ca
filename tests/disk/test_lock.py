"""One process at a time holds a lock, whether or not the kernel can tell."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_ds.disk import lock as module
from qwen_ds.disk.lock import Holder, holding
from qwen_ds.errors import UserError


def _hold(path: str, ready: Any) -> None:
    with holding(Path(path), "it"):
        ready.set()
        signal.pause()


@pytest.fixture
def other(tmp_path: Path) -> Any:
    """A process that holds the lock."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path / "lock"), ready))
    process.start()
    assert ready.wait(20)
    yield process
    process.kill()
    process.join()


def test_the_second_process_is_told_who_holds_it(tmp_path: Path, other: Any) -> None:
    expected = f"runs/A is being written by process {other.pid} on {os.uname().nodename}, since"
    with (
        pytest.raises(UserError, match=expected),
        holding(tmp_path / "lock", "runs/A"),
    ):
        pass
    assert other.is_alive() and (tmp_path / "lock").exists()


def test_a_killed_holder_is_followed_at_once(tmp_path: Path, other: Any) -> None:
    other.kill()
    other.join()
    began = time.monotonic()
    with holding(tmp_path / "lock", "it"):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < module.DEAD_SECONDS / 2
    assert not (tmp_path / "lock").exists()


def test_many_processes_hold_it_one_after_another(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    inside: list[int] = []
    most: list[int] = []

    def one() -> None:
        mine = 0
        while mine < 10:
            try:
                with holding(lock, "it"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                    mine += 1
            except UserError:
                time.sleep(0.001)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 40


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(module, "DEAD_SECONDS", 0.5)


def _of_another_machine(lock: Path) -> None:
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "2026-01-01 00:00:00"}))


def test_a_silent_holder_on_another_machine_is_given_up(tmp_path: Path, quick: None) -> None:
    _of_another_machine(tmp_path / "lock")
    said: list[str] = []
    began = time.monotonic()
    with holding(tmp_path / "lock", "it", said.append):
        assert time.monotonic() - began >= 0.5
    assert len(said) == 1 and "process 7 on elsewhere" in said[0]


def test_a_beating_holder_on_another_machine_is_believed(tmp_path: Path, quick: None) -> None:
    lock, done = tmp_path / "lock", threading.Event()
    _of_another_machine(lock)

    def beat() -> None:
        while not done.wait(0.05):
            os.utime(lock)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 7 on elsewhere"), holding(lock, "it"):
            pass
    finally:
        done.set()
        thread.join()
    assert json.loads(lock.read_text())["host"] == "elsewhere"


def test_the_holder_beats(tmp_path: Path, quick: None) -> None:
    lock = tmp_path / "lock"
    with holding(lock, "it"):
        first = lock.stat().st_mtime_ns
        ends = time.monotonic() + 10
        while lock.stat().st_mtime_ns == first:
            assert time.monotonic() < ends
            time.sleep(0.01)


def test_without_locks_of_the_file_system_the_heartbeat_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with (
        holding(tmp_path / "lock", "it"),
        pytest.raises(UserError, match=f"process {os.getpid()}"),
        holding(tmp_path / "lock", "it"),
    ):
        pass
    (tmp_path / "lock").write_text(json.dumps(vars_of_a_dead_process()))
    with holding(tmp_path / "lock", "it"):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def vars_of_a_dead_process() -> dict[str, Any]:
    return {"host": os.uname().nodename, "pid": 2**22 + 1, "since": "2026-01-01 00:00:00"}


def test_the_holder_is_worded_for_a_person() -> None:
    assert str(Holder("node7", 12, "2026-01-02 03:04:05")) == (
        "process 12 on node7, since 2026-01-02 03:04:05"
    )


@pytest.mark.parametrize("longer", ["the first", "the second"])
def test_without_locks_of_the_file_system_one_of_two_that_begin_at_once_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None, longer: str
) -> None:
    """Both have found the file without a holder; the name that was written last stays."""
    monkeypatch.setattr(module, "_holder", _both_at_once(monkeypatch))
    monkeypatch.setattr(fcntl, "flock", _no_locks)
    hosts = {"first": "a", "second": "b"}
    hosts[longer.removeprefix("the ")] *= 60  # a longer name leaves no tail behind
    monkeypatch.setattr(
        module.socket, "gethostname", lambda: hosts[threading.current_thread().name]
    )
    held: list[str] = []
    refused: list[str] = []
    over = threading.Event()

    def one() -> None:
        name = threading.current_thread().name
        try:
            with holding(tmp_path / "lock", "it"):
                held.append(name)
                over.wait(20)
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=one, name=name) for name in hosts]
    for thread in threads:
        thread.start()
    ends = time.monotonic() + 20
    while len(held) + len(refused) < 2:
        assert time.monotonic() < ends
        time.sleep(0.01)
    over.set()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 1, (held, refused)
    assert "it is being written by another process" in refused[0]


def _no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def _both_at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Holder | None]:
    """Let two threads find out together who holds a lock, before either writes its name, and look
    again only when both have written."""
    found, written = threading.Barrier(2), threading.Barrier(2)
    holder, pwrite, asked = module._holder, os.pwrite, threading.local()

    def waiting(file: Any) -> Holder | None:
        if not vars(asked):
            asked.once = True
            seen = holder(file)
            found.wait(20)
            return seen
        return holder(file)

    def write(*arguments: Any) -> int:
        count = pwrite(*arguments)
        written.wait(20)
        return count

    monkeypatch.setattr(os, "pwrite", write)
    return waiting
