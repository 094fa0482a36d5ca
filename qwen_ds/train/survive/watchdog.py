"""Ends a run that cannot go on: a rank that died, a collective that nobody leaves, a launcher that is gone.

A collective waits for a dead or stuck peer as long as its time-out, which gloo and NCCL keep unevenly and DeepSpeed's
groups may not have at all. So a thread of each rank posts once a second where the training is (a "beat") at the
rendezvous store, through a connection of its own. Rank 0, which serves the store, reads all beats and passes a verdict;
the others read that one, so the store's load stays linear in the ranks. Whoever learns that the run is over ends its
process at once: no collective begins once a peer is known dead.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from qwen_ds import dist
from qwen_ds.errors import EXIT_FAILURE
from qwen_ds.runlog import last_line

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
# A beat comes from a thread of its own, so it stops for long only with its process (or its whole machine).
SILENT_SECONDS = 30.0
# After a collective has failed here, a shorter silence tells which peer it was.
SUSPECT_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Beat:
    """Where a rank is. `moves` counts the places that all ranks pass in the same order; `touches` also those within."""

    number: int = 0  # of the beat itself
    moves: int = 0
    touches: int = 0
    step: int = 0
    doing: str = "start-up"
    waits: bool = False  # training: to stand still means to be stuck
    host: str = ""
    log: str = ""
    failed: str = ""  # the error that ended it


class Watchdog:
    """Watches from `start` to `stop`; the training says where it is with `at`.

    Args:
        timeout_minutes: how long all ranks may stand still within a step.
        launched: a launcher started this process; when it disappears, nobody could end the run.
    """

    def __init__(self, timeout_minutes: float, *, launched: bool) -> None:
        self._timeout_seconds = 60 * timeout_minutes
        self._silent_seconds = min(SILENT_SECONDS, self._timeout_seconds)
        self._own = Beat(host=socket.gethostname())  # written by the training's thread alone
        self._number = 0
        self._launcher = os.getppid() if launched else None
        self._world, self._rank = dist.world_size(), dist.rank()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._seen: dict[
            int, tuple[Beat, float, float]
        ] = {}  # beat; when it last came; when it last moved
        self._store: Any = None
        self._answered = time.monotonic()  # when the store last did
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to post and to look; after the process group is there."""
        if self._world > 1:
            self._store = dist.own_store("watchdog")
            self._post()
        self._thread = threading.Thread(target=self._beat, name="beats", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="watchdog", daemon=True).start()

    def at(self, step: int, doing: str) -> None:
        """The training is about to do something that all ranks do next, in the same order."""
        self._own = replace(
            self._own, moves=self._own.moves + 1, step=step, doing=doing, waits=True
        )

    def touch(self) -> None:
        """Still at the same place, and getting on."""
        self._own = replace(self._own, touches=self._own.touches + 1)

    def idle(self) -> None:
        """What follows may take any time."""
        self._own = replace(self._own, moves=self._own.moves + 1, waits=False)

    def stop(self) -> None:
        """Stop watching; every rank calls it. Rank 0 serves the store and leaves last."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(5 * BEAT_SECONDS)
        if self._store is not None:
            self._store.add("stopped", 1)
            ends = time.monotonic() + 10
            while (
                self._rank == 0
                and self._store.add("stopped", 0) < self._world
                and time.monotonic() < ends
            ):
                time.sleep(0.02)

    def tell(self, error: BaseException) -> None:
        """This rank ends with an error that it reports itself; ranks that do not share it hear of it."""
        if self._store is not None:
            self._own = replace(
                self._own, failed=f"{type(error).__name__}: {error}".splitlines()[0]
            )
            self._post_quietly()

    def blame(self, error: BaseException) -> str | None:
        """After an error in this rank's own thread: which peer's death it follows from, or None if it is its own."""
        if self._store is None:
            return None
        if not _of_the_network(error):
            self.tell(error)  # the peers' collectives will fail now, and they will want to know why
            return None
        ends = time.monotonic() + SUSPECT_SECONDS + 3 * BEAT_SECONDS
        while time.monotonic() < ends:
            try:
                self._look()
            except RuntimeError:
                return self._obituary(0, "its rendezvous store does not answer")
            if dead := self._dead(SUSPECT_SECONDS):
                return dead
            time.sleep(0.3)
        return None

    def _guard(self) -> None:
        """In a thread that never waits for anything: the launcher, and whether the store still answers at all (a
        machine without power closes no connection)."""
        last = time.monotonic()
        while not self._stopped.wait(BEAT_SECONDS):
            now = time.monotonic()
            if (
                now - last > SILENT_SECONDS / 3
            ):  # this whole process stood still (suspended?): nobody else is to blame
                self._seen, self._answered = {}, now
            last = now
            if self._launcher is not None and os.getppid() != self._launcher:
                self._end("the launcher is gone: nobody could stop this run")
            if self._store is not None and now - self._answered > self._silent_seconds + 10:
                self._end(self._obituary(0, "its rendezvous store does not answer"))

    def _beat(self) -> None:
        """In a thread of its own, which waits for the store."""
        while self._store is not None and not self._stopped.wait(BEAT_SECONDS):
            try:
                self._post()
                verdict = self._judge() if self._rank == 0 else self._verdict()
            except RuntimeError as error:  # torch's store: the connection broke
                if self._stopped.is_set():
                    return
                log.info("the rendezvous store does not answer: %s", error)
                verdict = self._obituary(0, "its rendezvous store does not answer")
            if verdict and not self._stopped.is_set():
                self._end(verdict)

    def _post(self) -> None:
        self._number += 1
        beat = replace(self._own, number=self._number, log=last_line())
        self._store.set(f"beat/{self._rank}", json.dumps(asdict(beat)))
        self._answered = time.monotonic()

    def _post_quietly(self) -> None:
        try:
            self._post()
        except RuntimeError:
            log.info("the rendezvous store does not answer")

    def _look(self, ranks: list[int] | None = None) -> None:
        """Read the beats of these ranks (None: of all) that have posted one."""
        keys = {rank: f"beat/{rank}" for rank in (range(self._world) if ranks is None else ranks)}
        now = time.monotonic()
        with self._lock:
            for rank, key in keys.items():
                if rank not in self._seen and not self._store.check([key]):
                    continue
                beat = Beat(**json.loads(self._store.get(key)))
                old, came, moved = self._seen.get(rank, (Beat(), now, now))
                if beat.number != old.number:
                    came = now
                if (beat.moves, beat.touches) != (old.moves, old.touches):
                    moved = now
                self._seen[rank] = (beat, came, moved)

    def _judge(self) -> str | None:
        """Rank 0: what ends the run, told to the others, or None."""
        self._look()
        verdict = self._dead(self._silent_seconds) or self._stuck()
        if verdict:
            self._store.set("verdict", verdict)
            time.sleep(3 * BEAT_SECONDS)  # the store ends with this process: let the others read it
        return verdict

    def _verdict(self) -> str | None:
        self._look([0])
        return self._store.get("verdict").decode() if self._store.check(["verdict"]) else None

    def _dead(self, seconds: float) -> str | None:
        now = time.monotonic()
        for rank, (beat, came, _) in sorted(self._seen.items()):
            if beat.failed and rank != self._rank:
                return self._obituary(rank, f"it failed with {beat.failed}")
            if rank != self._rank and now - came > seconds:
                return self._obituary(rank, f"its process has been silent for {now - came:.0f} s")
        return None

    def _obituary(self, rank: int, why: str) -> str:
        beat = self._seen.get(rank, (Beat(), 0.0, 0.0))[0]
        return (
            f"rank {rank}{f' on {beat.host}' if beat.host else ''} is gone at step {beat.step} ({beat.doing}): {why}; "
            f"the last line of its log: {beat.log or '(none)'}"
        )

    def _stuck(self) -> str | None:
        now = time.monotonic()
        if len(self._seen) < self._world or not all(
            beat.waits for beat, _, _ in self._seen.values()
        ):
            return None
        if any(now - moved < self._timeout_seconds for _, _, moved in self._seen.values()):
            return None
        behind = min(self._seen, key=lambda rank: self._seen[rank][0].moves)
        ahead = max(self._seen, key=lambda rank: self._seen[rank][0].moves)
        beat, first = self._seen[behind][0], self._seen[ahead][0]
        who = f"rank {behind} on {beat.host} is behind"
        if beat.moves == first.moves:
            who = "all ranks are at the same place"
        return (
            f"no rank has moved for {self._timeout_seconds / 60:g} minutes (distributed.timeout_minutes): {who}, at "
            f"step {beat.step} ({beat.doing}), while rank {ahead} is at step {first.step} ({first.doing}); "
            f"the last line of its log: {beat.log or '(none)'}"
        )

    def _end(self, why: str) -> None:
        log.error("%s", why)
        prefix = "" if self._rank == 0 else f"[rank {self._rank}] "
        print(f"{prefix}error: {why}", file=sys.stderr, flush=True)
        os._exit(
            EXIT_FAILURE
        )  # the main thread may be deep in a collective, where no exception reaches it


def _of_the_network(error: BaseException) -> bool:
    """Whether an error is what a collective raises when a peer has gone."""
    text = f"{type(error).__name__} {error}".lower()
    signs = (
        "connection closed",
        "connection reset",
        "broken pipe",
        "gloo",
        "nccl",
        "distbackend",
        "distnetwork",
    )
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in (*signs, "timed out", "timeout")
    )
