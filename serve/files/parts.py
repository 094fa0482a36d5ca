"""The finished rows of all ranks on disk: a prediction run is resumed and joined from them.

While OUTPUT is being made, there is a folder OUTPUT.parts. In it each rank appends its finished
rows to a file of its own, a batch at a time, and finds the rows that a killed run has finished,
whatever its number of ranks. Each line ends with a checksum: a damaged one is left out, and its row
is answered again. Once all rows are there, rank 0 writes them in order to OUTPUT, which is complete
or absent at every moment. The folder goes when the command needs it no longer. Ranks share no
process group, which could hang.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_ds.disk.lock import holding, kernel_lock
from qwen_ds.disk.place import require_folder, unwritable
from qwen_ds.disk.read import read_json
from qwen_ds.disk.write import naming, remove_folder, replacing, sync, write_json
from qwen_ds.errors import Failed, UserError
from qwen_ds.runlog import say
from serve.files.claims import FOLDER as CLAIMS
from serve.files.claims import Claims, block_rows
from serve.files.ranks import RankWatch

POLL_SECONDS = 0.2
SETTINGS_FILE = "settings.json"
# The output as it was joined; there for as long as the folder is.
JOINED_FILE = "joined.json"
ERROR_MARK = b'"finish_reason": "error"'
# The end of a line in the folder, which the output does not have.
_SUM = b', "crc32": "%08x"}\n'
_SUM_BYTES = len(_SUM % 0)


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
        self._watch: RankWatch | None = None
        self._claims: Claims | None = None
        # By file, the bytes that were read of it.
        self._read_up_to: dict[Path, int] = {}
        # The place of each finished row: a file (index into _read_up_to, -1: not finished), and the
        # start and end of its bytes in it.
        self._place_R3 = np.full((rows, 3), -1, dtype=np.int64)
        own = self.folder / f"rank_{rank:05d}.jsonl"
        self._stream = own.open("ab")
        # From a rank of another run that still lives.
        if kernel_lock(self._stream.fileno()) is False:
            self._stream.close()
            raise UserError(
                f"{own}: another process is writing it; expected one prediction at a time"
            )
        # A kill may have cut off the last line.
        self._stream.truncate(own.read_bytes().rfind(b"\n") + 1)
        sync(self.folder)
        # Files of an earlier release have lines without a checksum.
        left = _read_settings(self.folder) or {}
        self._sums = bool(left.get("sums"))
        self.block_rows = int(left.get("block_rows", 1))

    @classmethod
    def prepare(
        cls, output: Path, settings: Settings, rows: int, overwrite: bool, world: int = 1
    ) -> PredictionParts:
        """Rank 0: make the folder for so many ranks, or take over the one that a killed run left.

        UserError if it holds rows made with other settings, and `overwrite` is not set.
        """
        folder = parts_folder(output)
        card = folder / SETTINGS_FILE
        require_folder(folder)
        if folder.is_symlink():
            raise UserError(f"{folder}: a symbolic link; expected the name to be free")
        if folder.exists():
            left = _read_settings(folder)
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
            size = block_rows(rows, world)
            write_json(card, {"settings": settings, "rows": rows, "block_rows": size, "sums": True})
        return cls(output, 0, rows)

    def watch(self, watch: RankWatch, claims: Claims) -> None:
        """Rank 0: let `wait` fail where a rank is gone whose rows are missing."""
        self._watch, self._claims = watch, claims

    @classmethod
    def join_in(
        cls,
        output: Path,
        settings: Settings,
        rank: int,
        timeout_seconds: float,
        old: FileState,
        watch: RankWatch | None = None,
    ) -> PredictionParts | None:
        """Another rank: wait until rank 0 has checked the input and made the folder.

        `old` is the state of the earlier output that this run replaces. Returns None if all rows
        were done by then. Failed if rank 0 is gone, or has not made the folder in time.
        """
        folder, deadline = parts_folder(output), time.monotonic() + timeout_seconds
        while True:
            left = _read_settings(folder)
            if left and first_difference(settings, left["settings"]) is None:
                return cls(output, rank, left["rows"])
            # In this order: the folder is removed only after the output is there.
            if not folder.exists() and file_state(output) not in (None, old):
                return None
            if watch is not None and (gone := watch.gone()):
                raise Failed(f"{gone[0]} and has not begun; see what it said")
            if time.monotonic() > deadline:
                raise Failed(f"{folder}: rank 0 did not make it within {timeout_seconds:.0f} s")
            time.sleep(POLL_SECONDS)

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write finished rows (each with its "id"), wait until the disk has them, and so make them
        visible to every rank."""
        lines = [
            json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace")[:-1]
            for row in rows
        ]
        with naming(self.output):
            self._stream.write(b"".join(line + _SUM % zlib.crc32(line) for line in lines))
            self._stream.flush()
            os.fsync(self._stream.fileno())

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
                    row = self._row_of(line)
                    if row is None:
                        say(f"{file}: a damaged line at byte {start:,}; its row is answered again")
                    else:
                        self._place_R3[row] = number, start, start + len(line)
                    start += len(line)
            self._read_up_to[file] = start
        return int((self._place_R3[:, 0] >= 0).sum())

    def _row_of(self, line: bytes) -> int | None:
        """The row that a line answers; None if the line is damaged."""
        if self._sums and not _has_sum(line):
            return None
        try:
            row = json.loads(line)["id"]
        except (ValueError, TypeError, KeyError):
            return None
        return row if type(row) is int and 0 <= row < self.rows else None

    def is_finished(self, row_id: int) -> bool:
        """Whether the row was finished at the last refresh."""
        return bool(self._place_R3[row_id, 0] >= 0)

    def wait(self, timeout_seconds: float, progress: Callable[[int], None]) -> None:
        """Rank 0: wait until every row is finished.

        Failed if a rank is gone that had taken some of them, or if no rank has finished a row for
        `timeout_seconds`.
        """
        last, since = -1, time.monotonic()
        while True:
            gone = self._watch.gone() if self._watch else {}  # before its last rows are read
            if (finished := self.refresh()) == self.rows:
                break
            self._refuse_gone(gone)
            if finished != last:
                last, since = finished, time.monotonic()
                progress(finished)
            elif time.monotonic() - since > timeout_seconds:
                raise Failed(
                    f"{self.rows - finished} of {self.rows} rows are missing and no rank finished "
                    f"one for {timeout_seconds:.0f} s; the same command resumes from here"
                )
            time.sleep(POLL_SECONDS)
        progress(self.rows)

    def _refuse_gone(self, gone: Mapping[int, str]) -> None:
        """Raise Failed if one of the ranks that are gone had taken rows that are missing."""
        if not gone or self._claims is None:
            return
        missing = np.flatnonzero(self._place_R3[:, 0] < 0)
        for rank, who in gone.items():
            if count := sum(self._claims.rank_of(int(row)) == rank for row in missing):
                raise Failed(
                    f"{who} and {count} of its rows are missing; the same command resumes from here"
                )

    def join(self) -> int:
        """Rank 0, all rows finished: write them in order to the output; how many have an error in
        place of an answer. The folder stays, so that the same command knows the output for its own,
        until `remove_parts`."""
        failed = 0
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(file.open("rb")) for file in self._read_up_to]
            unfinished = stack.enter_context(replacing(self.output))
            with unfinished.open("wb") as out:
                for number, start, end in self._place_R3.tolist():
                    streams[number].seek(start)
                    line = streams[number].read(end - start)
                    failed += ERROR_MARK in line and _has_error(line)
                    out.write(line[:-_SUM_BYTES] + b"}\n" if _has_sum(line) else line)
            # Before the output has its name, which it gets with this state.
            write_json(self.folder / JOINED_FILE, {"output": file_state(unfinished)})
        self.close()
        return failed

    def close(self) -> None:
        # Only an append that has failed leaves bytes, and it has raised.
        with contextlib.suppress(OSError):
            self._stream.close()


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder to write in, and those above it; those that stay empty go again."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    require_folder(folder, make=True)
    try:
        yield
    finally:
        for each in made:
            with contextlib.suppress(OSError):  # not empty
                each.rmdir()


@contextlib.contextmanager
def held_output(file: Path) -> Iterator[None]:
    """Hold an output, a file that may be absent, against every other process, in its `made_folder`.

    UserError: another process writes it; the message names that and its host.
    """
    with made_folder(file.parent), contextlib.ExitStack() as held:
        try:
            held.enter_context(holding(file.with_name(f".{file.name}.lock"), str(file), say))
        except OSError as error:
            raise unwritable(file, error) from error
        yield


def _has_error(line: bytes) -> bool:
    return bool(json.loads(line)["finish_reason"] == "error")


def _has_sum(line: bytes) -> bool:
    return line.endswith(_SUM % zlib.crc32(line[:-_SUM_BYTES]))


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
    if file.exists() and not overwrite and not _was_just_joined(file):
        raise UserError(f"{file}: exists; expected {advice}")


def _was_just_joined(output: Path) -> bool:
    """Whether a command has joined this very file, and was stopped before it was done with it."""
    card = _read_card(parts_folder(output) / JOINED_FILE)
    return card is not None and card.get("output") == list(file_state(output) or ())


def remove_parts(output: Path) -> None:
    """Remove the folder of an output that is complete."""
    # Some network file systems refuse it while another rank still has its file open.
    with contextlib.suppress(OSError):
        remove_folder(parts_folder(output))


def parts_folder(output: Path) -> Path:
    return output.with_name(output.name + ".parts")


def _remove_ours(folder: Path) -> None:
    ours = ("rank_", CLAIMS, SETTINGS_FILE, f".{SETTINGS_FILE}", JOINED_FILE, f".{JOINED_FILE}")
    foreign = [file.name for file in folder.iterdir() if not file.name.startswith(ours)]
    if foreign:
        raise UserError(
            f"{folder}: holds {foreign[0]}, which no prediction run wrote; expected the name to be "
            "free"
        )
    shutil.rmtree(folder)


def _has_rows(folder: Path) -> bool:
    return any(b"\n" in file.read_bytes() for file in folder.glob("rank_*.jsonl"))


def _read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings and the rows of a folder; None where they are not there, or are not ours."""
    card = _read_card(folder / SETTINGS_FILE) or {}
    is_ours = isinstance(card.get("settings"), dict) and type(card.get("rows")) is int
    return card if is_ours else None


def _read_card(card: Path) -> dict[str, Any] | None:
    try:
        return read_json(card)
    except UserError:  # not there yet
        return None
