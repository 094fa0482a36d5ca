"""An output of rows that cost time or money: complete or absent, and resumed row by row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen_ds.errors import Failed
from qwen_ds.runlog import say
from serve.files.line_writer import LineWriter
from serve.files.parts import PredictionParts, Settings, check_output, held_output

Line = dict[str, Any]


def kept_rows(
    output: Path,
    settings: Settings,
    rows: int,
    make: Callable[[Sequence[int]], Iterator[Line]],
    overwrite: bool,
) -> list[Line]:
    """The lines of an output, made unless an interrupted run has made them.

    The folder of parts stays until `remove_parts`: until then the same call knows a finished output
    for its own.

    Args:
        rows: how many there are; each line has one's number as its id.
        make: yields the lines of the rows that are missing, as they end.
    """
    with ExitStack() as held:
        held.enter_context(held_output(output))
        check_output(output, overwrite)
        parts = PredictionParts.prepare(output, settings, rows, overwrite)
        held.callback(parts.close)
        if done := parts.refresh():
            say(f"{parts.folder}: {done} of {rows} rows are there from an interrupted run")
        left = [row for row in range(rows) if not parts.is_finished(row)]
        bar = tqdm(total=rows, initial=done, unit="row", desc=output.name, delay=0.1)
        with bar, LineWriter(parts, bar.update) as writer:
            for line in make(left):
                writer.write(line)
        if (finished := parts.refresh()) != rows:
            raise Failed(f"{output}: {rows - finished} of {rows} rows are missing")
        parts.join()
    return [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n")[:-1]]
