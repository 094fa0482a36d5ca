"""A lock that one process holds for as long as it lives, on one machine or on a network disk.

The kernel's lock ends with its holder, but some network file systems have none, or keep it to one
machine. So the holder also writes its name into the file and touches it every few seconds: where
the kernel lets a second process in, that one watches the file before it believes that the holder is
dead; where there is no kernel's lock at all, the name that stands in the file decides.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
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
_NAME_BYTES = 1024  # each name covers the one before


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
        # Creates the file, and keeps what a holder wrote into it.
        file = _opened(lock)
        is_ours, holder = kernel_lock(file.fileno()), _holder(file)
        if is_ours is False:
            file.close()
            raise _busy(lock, purpose, holder)
        # The kernel knows the processes of this machine, if its file system has locks at all.
        if holder is not None and (is_ours is None or holder.host != socket.gethostname()):
            _watch(lock, file, purpose, holder, say)
        # The last holder may have removed the file after we opened it.
        if _is_under_its_name(file, lock):
            own = Holder.this_process()
            os.pwrite(file.fileno(), json.dumps(asdict(own)).encode().ljust(_NAME_BYTES), 0)
            os.fsync(file.fileno())
            if is_ours or _is_last(own, lock):
                return file
            file.close()
            raise _busy(lock, purpose, None)
        file.close()


def _opened(lock: Path) -> BinaryIO:
    """The lock's file itself: a link may lead to a file of the user's, and our name replaces what
    a file holds."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(lock, flags, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(lock))
    return os.fdopen(descriptor, "r+b")


def _is_last(own: Holder, lock: Path) -> bool:
    """Whether ours is the name that stays, a beat later: another process may have begun at once."""
    time.sleep(BEAT_SECONDS)
    try:
        with lock.open("rb") as file:
            return _holder(file) == own
    except FileNotFoundError:
        return False


def kernel_lock(descriptor: int, wait: bool = False) -> bool | None:
    """Whether the kernel gives us the lock of an open file, which ends with the process; None where
    the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
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
