"""Lines of finished rows on their way to the disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from serve.files.parts import PredictionParts

# Finished rows wait for the disk together, but not for long.
ROWS_AT_ONCE, SECONDS_AT_ONCE = 16, 1.0


class LineWriter:
    """Writes lines to a folder of parts, and tells how many rows have been finished since, by any
    rank. What is finished is written even where the work ends by an error: it need not be made
    again."""

    def __init__(self, parts: PredictionParts, progress: Callable[[int], object]) -> None:
        self._parts, self._progress = parts, progress
        self._lines: list[dict[str, Any]] = []
        self._since = time.monotonic()
        self._finished = parts.refresh()

    def __enter__(self) -> LineWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()

    def write(self, line: dict[str, Any]) -> None:
        self._lines.append(line)
        is_late = time.monotonic() - self._since > SECONDS_AT_ONCE
        if len(self._lines) >= ROWS_AT_ONCE or is_late:
            self._flush()

    def _flush(self) -> None:
        lines, self._lines = self._lines, []
        if lines:
            self._parts.append(lines)
        finished = self._parts.refresh()
        self._progress(finished - self._finished)
        self._finished, self._since = finished, time.monotonic()
