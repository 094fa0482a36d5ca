"""The end of a run that cannot continue: a rank is dead, no rank moves, or the launcher is gone.

A collective waits for a dead or stuck peer as long as its time-out, which gloo and NCCL keep
unevenly and DeepSpeed's groups may not have at all. So a thread of each rank posts once a second
where the training is (a "beat") at the rendezvous store, through a connection of its own. Rank 0,
which serves the store, reads all beats and passes a verdict. The others read only that, so the
store's load is linear in the ranks. A rank that learns of the end leaves its process at once: no
collective begins once a peer is known to be dead.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from qwen_ds import dist, signals
from qwen_ds.errors import EXIT_FAILURE
from qwen_ds.runlog import last_line
from qwen_ds.terminal import one_line, show
from qwen_ds.train.survive.collectives import LastCollectives, by_rank

log = logging.getLogger(__name__)

T = TypeVar("T")
BEAT_SECONDS = 1.0
# Beats come from a thread of their own: a long silence means a lost process, or a lost machine.
SILENT_SECONDS = 30.0
# After a collective has failed on this rank, a shorter silence tells which peer is to blame.
SUSPECT_SECONDS = 3.0
NO_STORE = "its rendezvous store does not answer"
# In the errors that a collective raises when a peer is gone.
_NETWORK_SIGNS = (
    "connection closed", "connection reset", "broken pipe", "gloo", "nccl", "distbackend",
    "distnetwork", "timed out", "timeout",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Beat:
    """The position of a rank."""

    number: int = 0  # of the beat itself
    moves: int = 0  # places passed, which all ranks pass in the same order
    touches: int = 0  # signs of progress within a place
    step: int = 0
    doing: str = "start-up"
    waits: bool = False  # in training, where standing still means being stuck
    host: str = ""
    log: str = ""
    failed: str = ""  # the error that ended it
    signal: int = 0  # the signal that ended it, before the training began
    collectives: str = ""  # the last ones, of a rank that has stood still for long


class Watchdog:
    """Watch over the ranks from `start` to `stop`; the training reports its position with `at`.

    Args:
        timeout_minutes: how long all ranks may stand still within a step.
        launched: a launcher started this process. When it disappears, nobody could end the run.
    """

    def __init__(self, timeout_minutes: float, *, launched: bool) -> None:
        self._timeout_seconds = 60 * timeout_minutes
        self._silent_seconds = min(SILENT_SECONDS, self._timeout_seconds)
        self._own = Beat(host=socket.gethostname())  # written by the training's thread only
        self._number = 0
        self._launcher = os.getppid() if launched else None
        self._world, self._rank = dist.world_size(), dist.rank()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        # Of each rank: its last beat, when that came, and when the rank last moved.
        self._seen: dict[int, tuple[Beat, float, float]] = {}
        self._store: Any = None
        self._answered = time.monotonic()  # the store's last answer
        self._collectives = LastCollectives()
        self._moved = (0, 0, time.monotonic())  # moves, touches, and when they changed last
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to post and to look; needs the process group."""
        if self._world > 1:
            self._store = dist.own_store("watchdog")
            self._post()
        self._thread = threading.Thread(target=self._beat, name="beats", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="watchdog", daemon=True).start()

    def at(self, step: int, doing: str) -> None:
        """Report what the training does next; all ranks do it, in the same order."""
        moves = self._own.moves + 1
        self._own = replace(self._own, moves=moves, step=step, doing=doing, waits=True)

    @property
    def position(self) -> str:
        """Where the training is, in words."""
        return f"at step {self._own.step} ({self._own.doing})"

    def touch(self) -> None:
        """Report progress at the same place."""
        self._own = replace(self._own, touches=self._own.touches + 1)

    def touch_during(self, action: Callable[[], T]) -> T:
        """Run `action`, which waits for a disk, in a thread, and touch once a second until it ends.

        However slow the disk is, the ranks then do not count as stuck
        (test_a_rank_that_waits_for_a_disk_is_not_stuck). `action` must make no collective.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="disk") as pool:
            future = pool.submit(action)
            while wait([future], timeout=BEAT_SECONDS).not_done:
                self.touch()
            return future.result()

    def idle(self) -> None:
        """Report that the next thing may take any time."""
        self._own = replace(self._own, moves=self._own.moves + 1, waits=False)

    def pass_on(self, number: int) -> None:
        """Let the signal that ends this rank end the others, and stop watching.

        A launcher signals its ranks one after another, and may reach only some of them.
        """
        self._own = replace(self._own, signal=number)
        # A peer that waits for this rank in a collective hears of it only once this rank has left.
        with suppress(RuntimeError):  # the store is on a rank that has left
            if self._store is not None:
                self._post()
            self.stop(3 * BEAT_SECONDS)

    def stop(self, patience_seconds: float = 10.0) -> None:
        """Stop watching; every rank calls it. Rank 0 serves the store and leaves last."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(5 * BEAT_SECONDS)
        if self._store is not None:
            self._store.add("stopped", 1)
            ends = time.monotonic() + patience_seconds
            while self._rank == 0 and time.monotonic() < ends:
                if self._store.add("stopped", 0) >= self._world:
                    break
                time.sleep(0.02)

    def tell(self, error: BaseException) -> None:
        """Post the error with which this rank ends, for the ranks that do not share it."""
        if self._store is not None:
            failed = f"{type(error).__name__}: {error}".splitlines()[0]
            self._own = replace(self._own, failed=failed)
            try:
                self._post()
            except RuntimeError:
                log.info("the rendezvous store does not answer")

    def blame(self, error: BaseException) -> str | None:
        """Find the dead peer behind an error of this rank; None if the error is this rank's own."""
        if self._store is None:
            return None
        text = f"{type(error).__name__} {error}".lower()
        if not isinstance(error, RuntimeError) or not any(sign in text for sign in _NETWORK_SIGNS):
            self.tell(error)  # the peers' collectives fail now, and should name the reason
            return None
        ends = time.monotonic() + SUSPECT_SECONDS + 3 * BEAT_SECONDS
        while time.monotonic() < ends:
            try:
                self._look(range(self._world))
            except RuntimeError:
                return self._obituary(0, NO_STORE)
            if dead := self._dead(SUSPECT_SECONDS):
                return dead
            time.sleep(0.3)
        return None

    def _guard(self) -> None:
        """Watch the launcher, and whether the store answers at all, in a thread that never waits.

        A machine that loses power closes no connection: the other thread may wait for it for ever.
        """
        last = time.monotonic()
        while not self._stopped.wait(BEAT_SECONDS):
            now = time.monotonic()
            # This whole process stood still (it was suspended, say): no other rank is to blame.
            if now - last > SILENT_SECONDS / 3:
                self._seen, self._answered = {}, now
            last = now
            # A closed terminal ends the launcher at once; this rank saves first.
            orphaned = self._launcher is not None and os.getppid() != self._launcher
            if orphaned and signals.received() is None:
                self._end("the launcher is gone: nobody could stop this run")
            if self._store is not None and now - self._answered > self._silent_seconds + 10:
                self._end(self._obituary(0, NO_STORE))

    def _beat(self) -> None:
        """Post and read beats, in a thread that waits for the store."""
        while self._store is not None and not self._stopped.wait(BEAT_SECONDS):
            try:
                self._post()
                verdict = self._judge() if self._rank == 0 else self._verdict()
            except RuntimeError as error:  # torch's store: the connection broke
                if self._stopped.is_set():
                    return
                log.info("the rendezvous store does not answer: %s", error)
                verdict = self._obituary(0, NO_STORE)
            self._take_over_signal()
            if verdict and not self._stopped.is_set():
                self._end(verdict)

    def _take_over_signal(self) -> None:
        """Send this process the signal that a peer has passed on."""
        peers = (beat.signal for rank, (beat, _, _) in self._seen.items() if rank != self._rank)
        if signals.received() is None and (number := max(peers, default=0)):
            os.kill(os.getpid(), number)

    def _post(self) -> None:
        self._number += 1
        # At once, even if the main thread waits for a peer and has not heard of the signal.
        number = signals.ending() or self._own.signal
        beat = replace(self._own, number=self._number, log=last_line.text, signal=number)
        if self._stands_still(beat):
            self._collectives.read()
            beat = replace(beat, collectives=self._collectives.text)
        self._store.set(f"beat/{self._rank}", json.dumps(asdict(beat)))
        self._answered = time.monotonic()

    def _stands_still(self, beat: Beat) -> bool:
        """Whether this rank has not moved for half the time after which no rank may have."""
        now = time.monotonic()
        if self._moved[:2] != (beat.moves, beat.touches):
            self._moved = (beat.moves, beat.touches, now)
        return beat.waits and now - self._moved[2] > self._timeout_seconds / 2

    def _look(self, ranks: Iterable[int]) -> None:
        """Read the beats of those of these ranks that have posted one."""
        now = time.monotonic()
        with self._lock:
            for rank in ranks:
                key = f"beat/{rank}"
                if rank not in self._seen and not self._store.check([key]):
                    continue
                beat = Beat(**json.loads(self._store.get(key)))
                old, came, moved = self._seen.get(rank, (Beat(), now, now))
                if (beat.moves, beat.touches) != (old.moves, old.touches):
                    moved = now
                self._seen[rank] = (beat, came if beat.number == old.number else now, moved)

    def _judge(self) -> str | None:
        """Why the run must end, posted for the others, or None; on rank 0."""
        self._look(range(self._world))
        verdict = self._dead(self._silent_seconds) or self._stuck()
        if verdict:
            self._store.set("verdict", verdict)
            time.sleep(3 * BEAT_SECONDS)  # the others must read it before the store ends with us
        return verdict

    def _verdict(self) -> str | None:
        """Rank 0's verdict; or that rank 0 itself stands still, although its store answers: a call
        into CUDA that never returns may hold up all of Python's threads."""
        self._look([0])
        if self._store.check(["verdict"]):
            return self._store.get("verdict").decode()
        return self._dead(self._silent_seconds)

    def _dead(self, seconds: float) -> str | None:
        for rank, (beat, came, _) in sorted(self._seen.items()):
            silent = time.monotonic() - came
            if rank != self._rank and beat.failed:
                return self._obituary(rank, f"it failed with {beat.failed}")
            if rank != self._rank and silent > seconds:
                return self._obituary(rank, f"its process has been silent for {silent:.0f} s")
        return None

    def _obituary(self, rank: int, why: str) -> str:
        beat = self._seen.get(rank, (Beat(), 0.0, 0.0))[0]
        place = f" on {beat.host}" if beat.host else ""
        return (
            f"rank {rank}{place} is gone at step {beat.step} ({beat.doing}): {why}; "
            f"the last line of its log: {beat.log or '(none)'}"
        )

    def _stuck(self) -> str | None:
        seen, latest = self._seen, time.monotonic() - self._timeout_seconds
        stuck = all(beat.waits and moved <= latest for beat, _, moved in seen.values())
        if len(seen) < self._world or not stuck:
            return None
        beats = {rank: beat for rank, (beat, _, _) in seen.items()}
        behind = min(beats, key=lambda rank: beats[rank].moves)
        ahead = max(beats, key=lambda rank: beats[rank].moves)
        beat, first = beats[behind], beats[ahead]
        who = f"rank {behind} on {beat.host} is behind"
        if beat.moves == first.moves:
            who = "all ranks are at the same place"
        return (
            f"no rank has moved for {self._timeout_seconds / 60:g} minutes "
            f"(distributed.timeout_minutes): {who}, at step {beat.step} ({beat.doing}), while rank "
            f"{ahead} is at step {first.step} ({first.doing}); the last line of its log: "
            f"{beat.log or '(none)'}; collectives: "
            f"{by_rank(beats[rank].collectives for rank in range(self._world))}"
        )

    def _end(self, why: str) -> None:
        if signals.ending() is not None:
            return  # the main thread ends the process, or signals.py does
        log.error("%s", why)
        prefix = "" if self._rank == 0 else f"[rank {self._rank}] "
        show(f"{prefix}error: {one_line(why)}", err=True)
        # The main thread may be deep in a collective, where no exception reaches it.
        os._exit(EXIT_FAILURE)
