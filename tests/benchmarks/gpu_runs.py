"""A run of measurements on one GPU, each by a process of its own, for gpu.py and gpu_serve.py.

Figures are written as they come, so a run that is ended keeps what it has, and the same command
goes on from there. Nothing here imports torch.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu_processes import Ended, Processes, Refused
from tests.benchmarks.gpu_results import OUT_OF_TIME, OtherResults, Results

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Run:
    """What measurements need: where figures go, who makes them, and until when (monotonic)."""

    results: Results
    processes: Processes
    ends: float

    def measure(
        self, name: str, question: Mapping[str, Any], *, least: float, most: float, is_last: bool
    ) -> None:
        """Take one measurement's figures, unless they are there already, or a remark why there are
        none. Nothing is begun with less than `least` seconds left, or goes on after `most`."""
        left = self.ends - time.monotonic()
        if name in self.results.done:
            return
        if left < least:
            self._take(name, {"remark": OUT_OF_TIME})
            return
        try:
            for figures in self.processes.ask(question, min(left, most), is_last=is_last):
                self._take(name, figures, figures.pop("line", ""))
            self.results.finish(name)
        except Ended as reason:
            self._take(name, {"remark": str(reason)})

    def _take(self, name: str, figures: dict[str, Any], line: str = "") -> None:
        self.results.add(name, figures, line)
        print(line or name, figures, flush=True)


def run_measurements(
    file: Path,
    plan: Mapping[str, Any],
    command: Sequence[str],
    minutes: float,
    work: Callable[[Run], object],
    report: Callable[[Results], str],
) -> int:
    """Measure and print what was found, however the run ends; the exit code.

    Args:
        file: the results; what processes print goes to a file beside it.
        plan: the sizes. A file of other ones is left alone.
        command: starts a process that measures.
    """
    about = {
        "plan": json.loads(json.dumps(plan)),
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
    }
    try:
        results = Results(file, about)
        with (
            _ends_by_signals(),
            Processes(command, ROOT, file.with_suffix(".log")) as processes,
        ):
            try:
                work(Run(results, processes, time.monotonic() + 60 * minutes))
            finally:  # an end by a signal must not cost the figures before it
                print(f"\ntorch {about['torch']}, {report(results)}", flush=True)
    except (OtherResults, Refused) as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _ends_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise, as Ctrl-C does, so that what is held is let go."""

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
