"""The results of gpu.py: a file of JSON lines that grows as figures come, and its tables."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu_plan import GOAL_OF_PEERS, Goal, Measurement

OUT_OF_MEMORY, OUT_OF_TIME = "does not fit the memory", "no time left"
Figures = dict[str, Any]


class OtherResults(ValueError):
    """The file holds figures that cannot stand beside the new ones; the reason, in words."""


class Results:
    """Figures by name: of a measurement, or of one line of several that it gives.

    The first line of the file says of what they are. A line that a killed run has left half is
    dropped, and a name that comes again replaces what it had.

    Raises OtherResults if the file is about something else, or of another device.
    """

    def __init__(self, file: Path, about: Mapping[str, Any]) -> None:
        self.found: dict[str, Figures] = {}
        self.done: set[str] = set()  # measurements that need not be repeated
        self._file = file
        whole = file.read_bytes().rpartition(b"\n")[0].splitlines() if file.exists() else []
        try:
            records = [json.loads(line) for line in whole]
            theirs = dict(records[0]["about"]) if records else about
        except (ValueError, KeyError, TypeError):
            raise OtherResults(f"{file} holds something else; name another file") from None
        if key := next((key for key in about if theirs.get(key) != about[key]), None):
            came = theirs.get(key)
            raise OtherResults(
                f"{file} has figures with {key} {came}, not {about[key]}; name another file"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as out:
            out.truncate(sum(len(line) + 1 for line in whole))
        if not records:
            self._write({"about": dict(about)})
        for record in records[1:]:
            self._take(record)

    @property
    def device(self) -> str | None:
        """The device of the figures so far."""
        return next((f["device"] for f in self.found.values() if "device" in f), None)

    def add(self, measurement: str, figures: Figures, line: str = "") -> None:
        """Keep and write figures of a measurement, of one of its lines if it has several."""
        if (device := figures.get("device", self.device)) != (self.device or device):
            reason = f"has figures of {self.device}, and this is {device}"
            raise OtherResults(f"{self._file} {reason}; name another file")
        record = {"measurement": measurement, "line": line or measurement, **figures}
        self._write(record)
        self._take(record)

    def finish(self, measurement: str) -> None:
        """Note that a measurement has given all that it can."""
        self._write({"done": measurement})
        self.done.add(measurement)

    def _take(self, record: Figures) -> None:
        if "done" in record:
            self.done.add(record["done"])
        else:
            name, figures = record["line"], {k: v for k, v in record.items() if k != "line"}
            if "remark" in self.found.get(figures["measurement"], {}):  # of an earlier try
                del self.found[figures["measurement"]]
            self.found[name] = figures

    def _write(self, record: Figures) -> None:
        with self._file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
            out.flush()
            os.fsync(out.fileno())


def report(results: Results, measurements: Sequence[Measurement]) -> str:
    """The figures as Markdown, in the order of the plan; what has none is not there."""
    found, lines = results.found, [f"{results.device or 'no device'}", ""]
    for measurement in measurements:
        if measurement.kind in ("attention", "block", "step"):
            lines += _check(measurement.name, found)
    lines += [
        "| | GB | official, goal | s/step | official | tokens/s | goal | MFU | goal |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for measurement in measurements:
        if measurement.kind in ("ours", "peer") and measurement.name in found:
            lines.append(_row(measurement, found[measurement.name]))
    return "\n".join([*lines, "", *_comparison(found, measurements)])


def _check(name: str, found: Mapping[str, Figures]) -> Iterator[str]:
    """The lines of a check: each with its figures as they came."""
    for line, figures in found.items():
        if figures["measurement"] == name:
            shown = {k: v for k, v in figures.items() if k not in ("measurement", "device")}
            yield f"- {line}: " + ", ".join(f"{k} {_short(v)}" for k, v in shown.items())
    yield ""


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list):
        return "; ".join(map(_short, value)) or "none"
    return str(value)


def _row(measurement: Measurement, figures: Figures) -> str:
    if "remark" in figures:
        return f"| {measurement.name} | {figures['remark']} | | | | | | | |"
    goal: Goal = measurement.goal
    official_gb, official_seconds = measurement.official or ("", "")
    limits = ", ".join(str(n) for n in (official_gb, goal.gb) if n)
    speed = f"{goal.tokens_per_second:,.0f}" if goal.tokens_per_second else ""
    mfu = "" if figures.get("mfu") is None else f"{figures['mfu']:.1%}"
    cells = (
        measurement.name, f"{figures['gb']:.1f}", limits, f"{figures['seconds']:.2f}",
        official_seconds, f"{figures['tokens_per_second']:,.0f}", speed, mfu,
        f"{goal.mfu:.0%}" if goal.mfu else "",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _comparison(found: Mapping[str, Figures], measurements: Sequence[Measurement]) -> Iterator[str]:
    """Ours beside the fastest peer with the same adapter, whatever each has in a micro-batch."""
    speeds: dict[str, dict[str, float]] = {"ours": {}, "peer": {}}
    peers = {(m.setting.r, m.setting.length) for m in measurements if m.kind == "peer"}
    for measurement in measurements:
        figures, setting = found.get(measurement.name, {}), measurement.setting
        is_alike = not setting.whole and (setting.r, setting.length) in peers
        if is_alike and measurement.kind in speeds and "tokens_per_second" in figures:
            speeds[measurement.kind][measurement.name] = figures["tokens_per_second"]
    if all(speeds.values()):
        ours, theirs = (max(each, key=each.__getitem__) for each in speeds.values())
        ratio = speeds["ours"][ours] / speeds["peer"][theirs]
        yield f"{ours} is {ratio:.2f} times as fast as {theirs} (goal: {GOAL_OF_PEERS})."
