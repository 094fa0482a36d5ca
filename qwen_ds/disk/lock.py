"""A lock that one process holds for as long as it lives, on one machine or on a network disk.

The kernel's lock ends with its holder, but some network file systems have none, or keep it to one
machine. So the holder also writes its name into the file and touches it every few seconds: where
the kernel lets a second process in, that one watches the file before it believes that the holder is
dead.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from qwen_ds.errors import UserError

BEAT_SECONDS = 5.0
# Twelve beats: a holder may be stopped for a while, and network disks cache a file's time.
DEAD_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a lock, as the lock's file names it."""

    host: str
    pid: int
    since: str
    """Local time of the host."""

    @classmethod
    def this_process(cls) -> Holder:
        return cls(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def ignore(text: str) -> None:
    """Take a message and say nothing."""


@contextmanager
def holding(lock: Path, purpose: str, say: Callable[[str], None] = ignore) -> Iterator[None]:
    """Hold `lock`, a file in a folder that exists, until the block ends.

    Takes up to DEAD_SECONDS where the holder's machine died and its lock is not the kernel's.

    Args:
        purpose: what the lock is for, as messages word it: "runs/A: the run".
        say: is told that a holder on another machine is being watched.

    Raises:
        UserError: another process holds it; the message names host and process.
        OSError: of the disk.
    """
    file = _taken(lock, purpose, say)
    done = threading.Event()
    beat = threading.Thread(target=_beat, args=(lock, file.fileno(), done), daemon=True)
    beat.start()
    try:
        yield
    finally:
        done.set()
        beat.join()
        with suppress(OSError):
            lock.unlink()
        file.close()


def _taken(lock: Path, purpose: str, say: Callable[[str], None]) -> BinaryIO:
    while True:
        # Appending creates the file and keeps what a holder wrote into it.
        file = lock.open("a+b")
        is_ours, holder = _kernel_lock(file), _holder(file)
        if is_ours is False:
            file.close()
            raise _busy(lock, purpose, holder)
        # The kernel knows the processes of this machine, if its file system has locks at all.
        if holder is not None and (is_ours is None or holder.host != socket.gethostname()):
            _watch(lock, file, purpose, holder, say)
        # The last holder may have removed the file after we opened it.
        if _is_under_its_name(file, lock):
            file.truncate(0)
            file.write(json.dumps(asdict(Holder.this_process())).encode())
            file.flush()
            os.fsync(file.fileno())
            return file
        file.close()


def _kernel_lock(file: BinaryIO) -> bool | None:
    """Whether the kernel gives us the lock; None where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _is_under_its_name(file: BinaryIO, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), lock.stat())
    except FileNotFoundError:
        return False


def _holder(file: BinaryIO) -> Holder | None:
    """The last holder; None for a new file, or one that was killed before it wrote its name."""
    file.seek(0)
    try:
        return Holder(**json.loads(file.read(4096)))
    except (ValueError, TypeError):
        return None


def _watch(
    lock: Path, file: BinaryIO, purpose: str, holder: Holder, say: Callable[[str], None]
) -> None:
    """Wait until a holder on another machine has been silent for DEAD_SECONDS."""
    say(f"{lock}: left by {holder}; waiting up to {DEAD_SECONDS:.0f} s to see whether it is alive")
    last, began = os.fstat(file.fileno()).st_mtime_ns, time.monotonic()
    while time.monotonic() - began < DEAD_SECONDS:
        time.sleep(BEAT_SECONDS / 5)
        try:
            # Opened anew each time: that is when a network disk asks its server for the time.
            with lock.open("rb") as again:
                now = os.fstat(again.fileno()).st_mtime_ns
        except FileNotFoundError:
            return
        if now != last:
            raise _busy(lock, purpose, holder)


def _beat(lock: Path, descriptor: int, done: threading.Event) -> None:
    while not done.wait(BEAT_SECONDS):
        with suppress(OSError):  # a disk that is away for a while is not the end of the work
            os.utime(descriptor)


def _busy(lock: Path, purpose: str, holder: Holder | None) -> UserError:
    who = "another process" if holder is None else str(holder)
    return UserError(f"{purpose} is being written by {who} ({lock}); expected one at a time")
