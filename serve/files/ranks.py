"""Signs of life of the ranks of a prediction, which share no more than the output's folder.

From its start, before it looks for the model, each rank touches a file of its own beside the output
every few seconds, until its share is done. Rank 0 watches the others' from a thread, so that a long
batch of its own does not blind it; they watch rank 0's until it has made the folder of parts. At
the end rank 0 waits for those that start late: they must find the folder, or the output.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from qwen_ds import dist
from qwen_ds.disk.lock import BEAT_SECONDS, Holder
from qwen_ds.disk.place import require_folder
from qwen_ds.errors import Failed
from qwen_ds.runlog import say
from serve.files.claims import process_that_came

# Six beats: network disks cache a file's time for a few seconds.
SILENT_SECONDS = 30.0
# For a rank that has never come: all start together, and nothing slow comes before the first beat.
ABSENT_SECONDS = 60.0
LOOK_SECONDS = 1.0
_POLL_SECONDS = 0.1


def _file(output: Path, rank: int) -> Path:
    return output.with_name(f".{output.name}.rank_{rank:05d}.alive")


class SignOfLife:
    """The file of this rank, touched by a thread until `stop`, which removes it."""

    def __init__(self, output: Path, rank: int, own: Holder) -> None:
        self._own = own
        self._path = _file(output, rank)
        self._done = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._touch, name="beat", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
        with os.fdopen(os.open(self._path, flags, 0o644), "w") as file:
            file.write(json.dumps(asdict(self._own)))

    def _touch(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            with suppress(OSError):  # a disk that is away for a while is not the end of the work
                try:
                    os.utime(self._path)
                except FileNotFoundError:  # another run on this output, which was refused, took it
                    self._write()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()
        with suppress(OSError):
            self._path.unlink()


def process_of(output: Path, rank: int) -> Holder | None:
    """The process that is a rank now, by its sign of life; None if there is none."""
    try:
        return Holder(**json.loads(_file(output, rank).read_text()))
    except (OSError, ValueError, TypeError):
        return None


class RankWatch:
    """The view of a rank of those that it waits for, which are all others for rank 0, and rank 0
    for the others: one is gone whose file does not change for some time."""

    def __init__(self, output: Path, world: int, rank: int = 0) -> None:
        self.world = world
        self._output = output
        self._gone: dict[int, str] = {}
        self._done = threading.Event()
        now, awaited = time.monotonic(), [0] if rank else range(1, world)
        # Of each rank: the time of its file (None: no file), since when, and whether it ever beat.
        # A file that is there now may be a killed run's.
        self._seen = {rank: (self._time(rank), now, False) for rank in awaited}
        self._thread = threading.Thread(target=self._look_on, name="rank watch", daemon=True)
        self._thread.start()

    def gone(self) -> dict[int, str]:
        """The ranks that have been silent for too long, each with the words that say so. One that
        has done its share is among them."""
        return dict(self._gone)

    def wait_for_ends(self, has_joined: Callable[[int], bool]) -> None:
        """Wait until every rank has come and has ended, or is gone; ABSENT_SECONDS at most.

        `has_joined` knows of those that come and end between two looks.
        """
        began, is_said = time.monotonic(), False
        while (waited := time.monotonic() - began) < ABSENT_SECONDS:
            left = [rank for rank in self._seen if not self._has_ended(rank, has_joined)]
            if not left:
                return
            if waited > 2 * LOOK_SECONDS and not is_said:
                is_said = True
                say(f"all rows are done; waiting for rank {left[0]}, which starts late or is slow")
            time.sleep(_POLL_SECONDS)

    def _has_ended(self, rank: int, has_joined: Callable[[int], bool]) -> bool:
        if rank in self._gone:
            return True
        # In this order: one that joins has made its sign before, and removes it after.
        has_come = has_joined(rank) or self._seen[rank][2]
        return has_come and self._time(rank) is None

    def stop(self) -> None:
        self._done.set()
        self._thread.join()
        for rank in self._gone:  # a killed one leaves its file
            with suppress(OSError):
                _file(self._output, rank).unlink()

    def _look_on(self) -> None:
        last = time.monotonic()
        while not self._done.wait(LOOK_SECONDS):
            now = time.monotonic()
            # This process stood still (it was suspended, say), and so may have the others.
            if now - last > SILENT_SECONDS / 3:
                self._seen = {rank: (at, now, came) for rank, (at, _, came) in self._seen.items()}
            last = now
            self._gone = {rank: who for rank in self._seen if (who := self._judge(rank, now))}

    def _judge(self, rank: int, now: float) -> str | None:
        at, since, came = self._seen[rank]
        found = self._time(rank)
        if found != at:
            self._seen[rank] = found, now, came or found is not None
            return None
        if now - since < (SILENT_SECONDS if came else ABSENT_SECONDS):
            return None
        silent = f"rank {rank} has given no sign of life for {now - since:.0f} s"
        who = process_of(self._output, rank)
        return silent if who is None else f"{silent} ({who})"

    def _time(self, rank: int) -> int | None:
        try:
            # Opened anew each time: that is when a network disk asks its server for the time.
            with _file(self._output, rank).open("rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return None


class Leader:
    """Rank 0 over several outputs that all ranks make in turn; the parts of all stay to the end.

    The others come to the next output while rank 0 is still at work on the one before, for longer
    than they would wait for a sign of its life there. So rank 0 gives one all the time, beside the
    last file of all, and they wait until it has begun on the output.
    """

    def __init__(self, last: Path, outputs: Sequence[Path]) -> None:
        self._last, self._outputs = last, list(outputs)
        self._stops: list[Callable[[], None]] = []

    def __enter__(self) -> Leader:
        world, rank = dist.world_size(), dist.rank()
        if world > 1 and rank == 0:
            self._stops = [SignOfLife(self._last, 0, Holder.this_process()).stop]
        elif world > 1:
            require_folder(self._last.parent, make=True)
            self._watch = RankWatch(self._last, world, rank)
            self._stops = [self._watch.stop]
        return self

    def __exit__(self, *error: object) -> None:
        for stop in self._stops:
            stop()

    def wait_for(self, output: Path) -> None:
        """Return once rank 0 has begun on an output, or on a later one. Failed: it is gone."""
        if dist.rank() == 0:
            return
        coming = self._outputs[self._outputs.index(output) :]
        while not any(map(self._has_begun, coming)):
            if gone := self._watch.gone():
                raise Failed(f"{gone[0]} and has not begun on {output}; see what it said")
            time.sleep(_POLL_SECONDS)

    def _has_begun(self, output: Path) -> bool:
        # A sign of life would be too early: on its way to the first block rank 0 forgets who came
        # before, and would wait for one that has found all rows done and left.
        found = process_that_came(output.with_name(f"{output.name}.parts"), 0)
        leader = process_of(self._last, 0)
        if found is None or leader is None or (found.host, found.pid) != (leader.host, leader.pid):
            return False
        # A container started anew has its process ids again: a killed run's sign is older.
        return found.since >= leader.since
