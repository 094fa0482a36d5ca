"""Output that nobody takes: the work goes on, and its exit code is its own."""

from __future__ import annotations

import os
import pty
import sys
import time
from pathlib import Path

import pytest

from qwen_ds.errors import UserError
from qwen_ds.runlog import run_command
from qwen_ds.terminal import show, show_json
from tests.jobs import fork


def command(place: Path, output: str, more: bool) -> None:
    """In the child: print, wait until the reader has left, and print more."""
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))

    def main() -> int:
        print("first \u4f60\u597d", flush=True)
        while not (place / "left").exists():
            time.sleep(0.01)
        for _ in range(3):
            print("x" * 100_000, flush=True)
            print("y" * 100_000, file=sys.stderr, flush=True)
        if more:
            os.write(1, b"C++ and child processes, too")
        (place / "done").touch()
        return 3

    run_command(main)


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_reader_that_leaves_ends_nothing(kind: str, tmp_path: Path) -> None:
    """As `| head -1` does, and a terminal that is closed."""
    theirs = -1
    if kind == "pipe":
        name = str(tmp_path / "pipe")
        os.mkfifo(name)
        ours = os.open(name, os.O_RDWR)
    else:
        ours, theirs = pty.openpty()
        name = os.ttyname(theirs)
    process = fork(command, tmp_path, name, True)
    assert os.read(ours, 100).decode().startswith("first \u4f60\u597d")
    os.close(ours)
    if kind == "terminal":
        os.close(theirs)
    (tmp_path / "left").touch()
    process.join(60)
    process.kill()
    assert process.exitcode == 3 and (tmp_path / "done").is_file()


def test_a_full_disk_under_the_output_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "left").touch()
    process = fork(command, tmp_path, "/dev/full", False)
    process.join(60)
    process.kill()
    assert process.exitcode == 3 and (tmp_path / "done").is_file()


def closed(place: Path) -> None:
    """In the child: as a shell's >&- 2>&- starts a process."""
    sys.stdout.flush()
    os.close(1)
    os.close(2)
    sys.stdout = sys.stderr = None  # type: ignore[assignment]
    sys.__stdout__ = None  # type: ignore[misc]

    def main() -> int:
        with (place / "file").open("w") as file:
            print("words", flush=True)
            print("words", file=sys.stderr, flush=True)
            show("words")
            os.write(1, b"of C++")
            os.write(2, b"of C++")
            file.write("mine")
        with pytest.raises(UserError, match="standard output is closed, and the result goes there"):
            show_json(["{}"])
        return 3

    run_command(main)


def test_streams_that_were_closed_at_the_start_end_nothing(tmp_path: Path) -> None:
    """And no file of ours gets their numbers, under which libraries print."""
    process = fork(closed, tmp_path)
    process.join(60)
    process.kill()
    assert process.exitcode == 3 and (tmp_path / "file").read_text() == "mine"
