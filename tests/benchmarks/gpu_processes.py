"""Processes that measure: each does one thing and ends, so that it leaves nothing behind.

An engine that lives on would take memory from the next, an out-of-memory may leave it half done,
and the variables of a group of ranks would make HF's Trainer start a distributed job.

A process imports everything, reads one JSON line from its standard input, and answers with JSON
lines of figures, the last of which is END, or has FAILED or REFUSED and the reason in a line. It
ends itself when that input closes, so none outlives this one, however it ends. The next process
imports while the present one measures.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

END, FAILED, REFUSED = {"end": True}, "failed", "refused"
# Set by launchers, of which a measurement knows nothing.
_OF_LAUNCHERS = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "NODE_RANK",
    "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE",
)  # fmt: skip
_PREFIXES = ("ROLE_", "TORCHELASTIC_", "ACCELERATE_", "SLURM_", "OMPI_", "PMI", "MPI_")


def clean_environment(own: Mapping[str, str]) -> dict[str, str]:
    """The variables for a measurement: no rank, and one GPU, since HF's Trainer would take all."""
    kept = {
        name: value
        for name, value in own.items()
        if name not in _OF_LAUNCHERS and not name.startswith(_PREFIXES)
    }
    kept["CUDA_VISIBLE_DEVICES"] = own.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return kept


class Ended(Exception):
    """The process has ended before it was done, or was ended; the reason, in words."""


class Refused(Exception):
    """No measurement is possible here; the reason, in words for the user."""


class Processes:
    """Starts processes by `command`. What they print goes to the file `log`."""

    def __init__(self, command: Sequence[str], folder: Path, log: Path) -> None:
        self._command, self._folder = list(command), folder
        self._log: BinaryIO = log.open("ab")
        self._waiting: subprocess.Popen[bytes] | None = None
        self._alive: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        for process in list(self._alive):
            self._end(process)
        self._log.close()

    def ask(
        self, question: Mapping[str, Any], seconds: float, *, is_last: bool
    ) -> Iterator[dict[str, Any]]:
        """The answers of one process to a question, as they come.

        Raises Ended: without an END within `seconds`, or by an error of the process; Refused: no
        other will be answered either.
        """
        process = self._waiting or self._start()
        self._waiting = None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:  # it has ended while it imported; `_answers` says so
            pass
        if not is_last:
            self._waiting = self._start()
        try:
            yield from self._answers(process, time.monotonic() + seconds, seconds)
        finally:
            self._end(process)

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            self._command, cwd=self._folder, env=clean_environment(os.environ),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others
        )  # fmt: skip
        self._alive.append(process)
        return process

    def _answers(
        self, process: subprocess.Popen[bytes], ends: float, seconds: float
    ) -> Iterator[dict[str, Any]]:
        lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

        def read() -> None:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    lines.put(line)
            lines.put(b"")

        threading.Thread(target=read, daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=max(0.0, ends - time.monotonic()))
            except queue.Empty:
                raise Ended(f"ended after {seconds:.0f} s") from None
            if not line:
                raise Ended(_how(process.pid))
            if not line.startswith(b"{"):  # a library has printed, too
                self._log.write(line)
                continue
            answer = json.loads(line)
            if answer == END:
                return
            if FAILED in answer:
                raise Ended(answer[FAILED])
            if REFUSED in answer:
                raise Refused(answer[REFUSED])
            yield answer

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """End a process and those that it started, such as compilers, which share its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # a line that was never read
            process.stdin.close()
        self._alive.remove(process)
        if self._waiting is process:
            self._waiting = None


def take_answers() -> TextIO:
    """Standard output, in a process that measures, for its answers alone: what else is printed from
    here on goes to the log."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def end_with_parent() -> None:
    """In a process that measures: wait until its input closes, however the process there ends, and
    end, with those that it started."""
    sys.stdin.read()
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)


def _how(pid: int) -> str:
    """How a process ended, in words. It stays a zombie, so that its number belongs to no other."""
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert found is not None
    if found.si_code == os.CLD_EXITED:
        return f"ended with exit code {found.si_status}; the log says why"
    return f"ended by {signal.Signals(found.si_status).name}; the log says more"
