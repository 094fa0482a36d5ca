"""Whole training jobs as processes. They are forked off a process that has torch and DeepSpeed
imported already, which saves each of them the seconds of importing; what the launchers add is
tested on its own."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "train.py"

MAX_WORKERS, WORKER_BYTES = 8, 3 * 2**30  # a worker with its jobs, at their largest

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["qwen_ds.train.run", "qwen_ds.demo", "qwen_ds.export.merge", "serve.predict"]
)


def fork(target: Callable[..., None], *args: object) -> ForkServerProcess:
    """Start a function in a process that has everything imported."""
    process = _context.Process(target=target, args=args)
    process.start()
    return process


def num_workers(cores: int, memory: int) -> int:
    """Processes to spread the tests over, on a machine of so many cores and bytes."""
    return max(1, min(cores, MAX_WORKERS, memory // WORKER_BYTES))


def shared_memory() -> set[str]:
    """Shared memory on this machine; semaphores come and go with other processes' pools."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


def shared_memory_left(before: set[str], seconds: float = 30.0) -> set[str]:
    """Shared memory that was not there before and stays. Tests beside this one have some, too,
    which goes with their jobs."""
    ends, left = time.monotonic() + seconds, shared_memory() - before
    while left and time.monotonic() < ends:
        time.sleep(0.1)
        left &= shared_memory()
    return left


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(
    script: str, arguments: Sequence[str], environment: Mapping[str, str], out: str, err: str
) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))
    os.chdir(ROOT)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


class Job:
    """A running or finished job: its ranks, the exit code of each (-9: killed), and what all of
    them printed."""

    def __init__(self, arguments: Sequence[str], ranks: int, script: Path = SCRIPT) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("out", "err")]
        for file in self._files:
            file.touch()
        meeting = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(ranks),
        }
        self.ranks: list[ForkServerProcess] = []
        for rank in range(ranks):
            environment = meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            names = [str(file) for file in self._files]
            self.ranks.append(fork(_rank_main, str(script), list(arguments), environment, *names))

    @property
    def running(self) -> bool:
        return any(process.is_alive() for process in self.ranks)

    @property
    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.ranks]

    @property
    def out(self) -> str:
        return self._files[0].read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._files[1].read_text(errors="replace")

    def until(self, holds: Callable[[], bool], seconds: float = 120.0) -> Job:
        """Wait until something holds; fails if the job ends or the time is over before."""
        ends = time.monotonic() + seconds
        while not holds():
            assert self.running, f"ended with {self.codes}\n{self.err[-3000:]}"
            assert time.monotonic() < ends, (
                f"waited {seconds} s\n{self.out[-2000:]}\n{self.err[-2000:]}"
            )
            time.sleep(0.01)
        return self

    def send(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> Job:
        """Send a signal to these ranks (None: to all) that still run."""
        for rank in range(len(self.ranks)) if ranks is None else ranks:
            pid = self.ranks[rank].pid
            if self.ranks[rank].is_alive() and pid is not None:
                os.kill(pid, number)
        return self

    def wait(self, timeout: float = 300.0, mercy: float | None = None) -> Job:
        """Wait for the end. `mercy`: what the ranks that are left get once one has failed, as from
        a launcher."""
        ends = time.monotonic() + timeout
        while self.running and time.monotonic() < ends:
            if mercy is not None and any(self.codes):
                ends, mercy = min(ends, time.monotonic() + mercy), None
            time.sleep(0.02)
        for process in self.ranks:
            if process.is_alive():
                process.kill()
            process.join()
        return self

    def ok(self) -> Job:
        assert set(self.codes) == {0}, (
            f"exit codes {self.codes}\n{self.out[-2000:]}\n{self.err[-4000:]}"
        )
        return self


def run_job(arguments: Sequence[str], ranks: int = 1, timeout: float = 300.0) -> Job:
    """launch/train.py with the variables that a launcher sets, to its end. As a launcher does, the
    ranks that are left are ended soon after one has failed."""
    return Job(arguments, ranks).wait(timeout, mercy=20.0)
