"""An evaluation in words: counts, tables and some answers to read, for a terminal."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len, chop_cells

from serve.scores.answers import Line
from serve.scores.scored import SHOWN_ROWS, Scored, speed_of

_SURE = 0.05  # of p, below which a difference is marked


def side_in_words(scored: Scored, report: Mapping[str, Any]) -> str:
    """One side: a line of counts, the table of scores, and its best and worst answers."""
    return f"{_counts(scored, report)}\n\n{table(scored)}\n\n{_extremes(scored)}"


def _counts(scored: Scored, report: Mapping[str, Any]) -> str:
    counts = [f"{report['rows']} rows", f"{report['empty_predictions']} empty predictions"]
    counts += [f"{count} ended by {reason}" for reason, count in report["finish_reasons"].items()]
    if scored.figures is not None and (rate := speed_of(scored)["tokens_per_second"]):
        counts.append(f"{scored.figures.seconds:.1f} s, {rate:.1f} tokens/s")
    return ", ".join(counts)


def table(scored: Scored) -> str:
    """Every measure with its 95 % interval; precision and recall beside F where there are."""
    lines = [f"{'measure':<28}{'score':>9}  {'95 % interval':<20}{'P':>8}{'R':>8}"]
    values = scored.values
    for name, value in values.items():
        if name.endswith((".p", ".r")) or value is None:
            continue
        low, high = scored.intervals[name]
        line = f"{name:<28}{value:>9.4f}  {f'{low:.4f} to {high:.4f}':<20}"
        for part in ("p", "r"):
            other = values.get(f"{name}.{part}")
            line += "" if other is None else f"{other:>8.4f}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _extremes(scored: Scored) -> str:
    ranked, lines = scored.ranked(), scored.lines
    few = min(SHOWN_ROWS, -(-len(lines) // 2))
    width = shutil.get_terminal_size().columns
    out = []
    for title, places in (("best", ranked[::-1][:few]), ("worst", ranked[:few])):
        places = [place for place in places if title == "best" or place not in ranked[::-1][:few]]
        out += [f"{title}: {sample(lines[place], width)}" for place in places]
    return "\n\n".join(out)


def sample(line: Line, columns: int) -> str:
    """One answer to read: question, reference and prediction, each wrapped after its name."""
    out = [str(line.get("source", ""))]
    for name in ("prompt", "reference", "prediction"):
        text = " ".join(str(line.get(name) or "").split()) or "(empty)"
        first, *rest = chop_cells(text, max(columns - 14, 20))
        out += [f"  {name:<12}{first}", *(" " * 14 + piece for piece in rest)]
    return "\n".join(out)


def comparison_in_words(found: Mapping[str, Any]) -> str:
    """Sides beside each other: each measure's score and half its interval, * where the difference
    to the first side has p below 0.05."""
    names, scores, tests = found["models"], found["scores"], found["paired"]
    width = max(20, *(cell_len(name) + 2 for name in names))
    lines = [f"{'measure':<28}" + "".join(_padded(name, width) for name in names)]
    for measure, sides in scores.items():
        if measure.endswith((".p", ".r")):
            continue
        cells = [_cell(sides.get(name), tests.get(measure, {}).get(name)) for name in names]
        lines.append((f"{measure:<28}" + "".join(_padded(cell, width) for cell in cells)).rstrip())
    note = f"{found['rows']} rows; score and half its 95 % interval; * differs from {names[0]}, p"
    return "\n".join([*lines, "", f"{note} < {_SURE:g}"])


def _cell(told: Sequence[float | None] | None, test: Mapping[str, float] | None) -> str:
    if told is None or told[0] is None:
        return "-"
    value, low, high = told
    half = "" if low is None or high is None else f" ±{(high - low) / 2:.4f}"
    return f"{value:.4f}{half}" + (" *" if test is not None and test["p"] < _SURE else "")


def _padded(text: str, width: int) -> str:
    return " " * max(width - cell_len(text), 1) + text
