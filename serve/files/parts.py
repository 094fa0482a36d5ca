"""The finished rows of all ranks on disk: a prediction run is resumed and joined from them.

While OUTPUT is being made, there is a folder OUTPUT.parts. In it each rank appends its finished
rows to a file of its own, a batch at a time, and finds the rows that a killed run has finished,
whatever its number of ranks. Once all rows are there, rank 0 writes them in order to OUTPUT, which
is complete or absent at every moment, and removes the folder. Ranks share nothing else, in
particular no process group that could hang.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_ds.disk.place import require_folder
from qwen_ds.disk.read import read_json
from qwen_ds.disk.write import naming, remove_folder, replacing, write_json
from qwen_ds.errors import UserError

POLL_SECONDS = 0.2
SETTINGS_FILE = "settings.json"


Settings = dict[str, Any]
"""Everything that the rows of a folder depend on, as JSON; rows with other settings must not be
mixed in."""


def first_difference(ours: Settings, theirs: Settings) -> str | None:
    """The first setting that differs, in words; None if all agree."""
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            return f"{name} {_short(theirs.get(name))} instead of {_short(ours.get(name))}"
    return None


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


class PredictionParts:
    """The folder OUTPUT.parts as one rank sees it; open it with `prepare` on rank 0 and `join_in`
    on the others. `rows` is the number of rows of the whole run.
    """

    def __init__(self, output: Path, rank: int, rows: int) -> None:
        self.folder, self.output, self.rows = parts_folder(output), output, rows
        # By file, the bytes that were read of it.
        self._read_up_to: dict[Path, int] = {}
        # The place of each finished row: a file (index into _read_up_to, -1: not finished), and the
        # start and end of its bytes in it.
        self._place_R3 = np.full((rows, 3), -1, dtype=np.int64)
        own = self.folder / f"rank_{rank:05d}.jsonl"
        self._stream = own.open("ab")
        # A kill may have cut off the last line.
        self._stream.truncate(own.read_bytes().rfind(b"\n") + 1)

    @classmethod
    def prepare(
        cls, output: Path, settings: Settings, rows: int, overwrite: bool
    ) -> PredictionParts:
        """Rank 0: make the folder, or take over the one that a killed run left.

        UserError if it holds rows made with other settings, and `overwrite` is not set.
        """
        folder = parts_folder(output)
        card = folder / SETTINGS_FILE
        require_folder(folder)
        if folder.exists():
            left = _read_card(card)
            difference = first_difference(settings, left["settings"]) if left else None
            if difference and not overwrite and _has_rows(folder):
                raise UserError(
                    f"{folder}: holds the rows of an interrupted run with {difference}; "
                    "expected the same settings to resume it, or --overwrite true to drop them"
                )
            if difference or not left:
                _remove_ours(folder)
        require_folder(folder, make=True)
        if not card.exists():  # the last thing to appear: the other ranks wait for it
            write_json(card, {"settings": settings, "rows": rows})
        return cls(output, 0, rows)

    @classmethod
    def join_in(
        cls, output: Path, settings: Settings, rank: int, timeout_seconds: float, old: FileState
    ) -> PredictionParts | None:
        """Another rank: wait until rank 0 has checked the input and made the folder.

        `old` is the state of the earlier output that this run replaces. Returns None if all rows
        were done by then. RuntimeError if rank 0 has not made the folder in time.
        """
        card, deadline = parts_folder(output) / SETTINGS_FILE, time.monotonic() + timeout_seconds
        while True:
            left = _read_card(card)
            if left and first_difference(settings, left["settings"]) is None:
                return cls(output, rank, left["rows"])
            # In this order: the folder is removed only after the output is there.
            if not card.parent.exists() and file_state(output) not in (None, old):
                return None
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{card.parent}: rank 0 did not make it within {timeout_seconds:.0f} s"
                )
            time.sleep(POLL_SECONDS)

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write finished rows (each with its "id") and make them visible to every rank."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        with naming(self.output):
            self._stream.write("".join(lines).encode())
            self._stream.flush()

    def refresh(self) -> int:
        """Find the rows appended since the last call, by any rank; return how many are finished."""
        for file in sorted(self.folder.glob("rank_*.jsonl")):
            start = self._read_up_to.setdefault(file, 0)
            number = list(self._read_up_to).index(file)
            with file.open("rb") as stream:
                stream.seek(start)
                for line in stream:
                    if not line.endswith(b"\n"):
                        break  # being written, or cut off by a kill
                    self._place_R3[json.loads(line)["id"]] = number, start, start + len(line)
                    start += len(line)
            self._read_up_to[file] = start
        return int((self._place_R3[:, 0] >= 0).sum())

    def is_finished(self, row_id: int) -> bool:
        """Whether the row was finished at the last refresh."""
        return bool(self._place_R3[row_id, 0] >= 0)

    def wait(self, timeout_seconds: float, progress: Callable[[int], None]) -> None:
        """Rank 0: wait until every row is finished.

        RuntimeError if no rank has finished a row for `timeout_seconds`.
        """
        last, since = -1, time.monotonic()
        while (finished := self.refresh()) < self.rows:
            if finished != last:
                last, since = finished, time.monotonic()
                progress(finished)
            elif time.monotonic() - since > timeout_seconds:
                raise RuntimeError(
                    f"{self.rows - finished} of {self.rows} rows are missing and no rank finished "
                    f"one for {timeout_seconds:.0f} s; the same command resumes from here"
                )
            time.sleep(POLL_SECONDS)
        progress(self.rows)

    def join(self) -> None:
        """Rank 0, all rows finished: write them in order to the output and remove the folder."""
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(file.open("rb")) for file in self._read_up_to]
            out = stack.enter_context(stack.enter_context(replacing(self.output)).open("wb"))
            for number, start, end in self._place_R3.tolist():
                streams[number].seek(start)
                out.write(streams[number].read(end - start))
        self.close()
        # Some network file systems refuse it while another rank still has its file open.
        with contextlib.suppress(OSError):
            remove_folder(self.folder)

    def close(self) -> None:
        self._stream.close()


FileState = tuple[int, int] | None


def file_state(file: Path) -> FileState:
    """Identity of a file, which changes when the file is replaced; None if there is no file."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def check_output(
    file: Path, overwrite: bool, advice: str = "a new file, or --overwrite true to replace it"
) -> None:
    """Raise UserError unless `file` is free, or may be replaced, and its folder can be written."""
    require_folder(file.parent)
    if file.is_dir():
        raise UserError(f"{file}: a folder; expected the name of a file to write")
    if file.exists() and not overwrite:
        raise UserError(f"{file}: exists; expected {advice}")


def parts_folder(output: Path) -> Path:
    return output.with_name(output.name + ".parts")


def _remove_ours(folder: Path) -> None:
    ours = ("rank_", SETTINGS_FILE, f".{SETTINGS_FILE}")
    foreign = [file.name for file in folder.iterdir() if not file.name.startswith(ours)]
    if foreign:
        raise UserError(
            f"{folder}: holds {foreign[0]}, which no prediction run wrote; expected the name to be "
            "free"
        )
    shutil.rmtree(folder)


def _has_rows(folder: Path) -> bool:
    return any(b"\n" in file.read_bytes() for file in folder.glob("rank_*.jsonl"))


def _read_card(card: Path) -> dict[str, Any] | None:
    try:
        return read_json(card)
    except UserError:  # not there yet
        return None
