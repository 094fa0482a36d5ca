"""Output of a command: a few lines on the terminal, everything else in log files, an exit code.

Libraries (DeepSpeed, transformers, peft) talk through `logging` and `warnings`. Their lines go to
`<output_dir>/logs/rank_N.log`, one file per rank; the terminal shows rank 0's own messages.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_ds import dist, signals
from qwen_ds.errors import (
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_USER,
    Failed,
    OutOfMemory,
    UserError,
)
from qwen_ds.terminal import guard, one_line, show, visible

LIBRARY_LOGGERS = (
    "DeepSpeed", "transformers", "datasets", "huggingface_hub", "peft", "jieba", "matplotlib",
)  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of a path that a user has given, or of one below it.
_NO_WAY = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.EISDIR,
    errno.ENAMETOOLONG,
)  # fmt: skip


def run_command(main: Callable[[], int | None], stopped_code: int | None = None) -> None:
    """Run an entry point and leave the process with its exit code.

    A UserError becomes one line on stderr and exit code 2, and so does a path that the system does
    not let us use; a full disk one line and 1, a signal one line and the code of `signals.raised`.
    Any other error is a defect of ours: the traceback shows and the exit code is 1.
    """
    guard()
    code: int | None
    local_rank = 0
    try:
        dist.check_place()
        with signals.raised(stopped_code, speaks=dist.rank() == 0):
            local_rank = dist.local_rank()
            code = main()
    except UserError as error:
        line, code = f"error: {error}", EXIT_USER
        # Every rank of a machine may have found the same mistake. The first speaks at once; a
        # launcher then ends the others within these two seconds; without one they speak, too.
        if local_rank:
            time.sleep(2)
            line = f"[local rank {local_rank}] {line}"
        show(one_line(line), err=True)
    except signals.Stopped as stopped:
        code = signals.last_words(stopped.number)
    except KeyboardInterrupt:
        code = signals.last_words(signal.SIGINT)
    except Exception as error:
        if (number := signals.ending()) is not None:  # a worker or a peer has left before us
            code = signals.last_words(number)
        elif (failure := in_one_line(error)) is not None:
            show(f"error: {one_line(failure)}", err=True)
            code = failure_code(error)
        else:
            raise
    sys.exit(code or EXIT_DONE)


def in_one_line(error: BaseException) -> str | None:
    """The words for a failure that is not a defect of ours, a full disk above all; else None."""
    if isinstance(error, Failed):
        return str(error)
    if isinstance(error, OSError) and _is_about_a_path(error):
        return f"{error.filename}: {error.strerror}; expected a path that this user can use"
    if not isinstance(error, OSError) or error.errno not in _FULL:
        return None
    place = error.filename or "the output"
    return (
        f"{place}: {error.strerror}; expected room on the disk; what is complete stays, and the "
        "same command goes on from there"
    )


def failure_code(error: BaseException) -> int:
    """The exit code after an error that is worded by `in_one_line`, or by nobody."""
    is_the_users = isinstance(error, OutOfMemory) or _is_about_a_path(error)
    return EXIT_USER if is_the_users else EXIT_FAILURE


def _is_about_a_path(error: BaseException) -> bool:
    if not isinstance(error, OSError) or error.filename is None:
        return False
    return error.errno in _NO_WAY


class _Visible(logging.Formatter):
    """Log lines as they would be printed: people look at log files on terminals."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


class _LastLine(logging.Handler):
    """The last log line of this rank, which its peers report when it dies."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = (record.getMessage().splitlines() or [""])[0][:300]


last_line = _LastLine()


class _LogFile(logging.FileHandler):
    """A log file that drops lines while its disk is full, instead of a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def say(text: str) -> None:
    """Print a message on the terminal, on rank 0 only, and log it on every rank."""
    logging.getLogger("qwen_ds").info(text)
    if dist.rank() == 0:
        show(text)


def log_to_file(folder: Path) -> None:
    """Send this rank's log lines and warnings, libraries' included, to a file under `folder`.

    UserError: something else has the name of the file or of the folder.
    """
    file = folder / f"rank_{dist.rank()}.log"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file; expected a folder for the logs")
    if file.is_dir() or file.is_fifo():  # a FIFO would wait for a reader
        raise UserError(f"{file}: not a regular file; expected a log, or nothing")
    folder.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(file, encoding="utf-8")
    layout = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, handlers=[handler, last_line], force=True)
    handler.setFormatter(_Visible(layout))
    for name in LIBRARY_LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    threading.excepthook = _thread_has_failed
    logging.captureWarnings(True)
    warnings.simplefilter("default")


def _thread_has_failed(args: threading.ExceptHookArgs) -> None:
    """Log the error of a disk, which TensorBoard's thread also hands to its next caller; print any
    other."""
    if isinstance(args.exc_value, OSError):
        logging.getLogger("qwen_ds").warning("a thread has ended: %s", args.exc_value)
    else:
        threading.__excepthook__(args)


class JsonLines:
    """An append-only file of one JSON object a line, flushed at once so that it can be followed.

    Of an existing file `keep` bytes stay: a resumed run repeats the lines after its checkpoint.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        if path.stat().st_size > keep:
            self._file.truncate(keep)
        self._bytes, self._waiting = path.stat().st_size, b""

    def write(self, row: dict[str, Any]) -> None:
        """Append a row. On a full disk the rest waits for the next call; training continues."""
        self._waiting += (json.dumps(row, ensure_ascii=False) + "\n").encode(
            errors="backslashreplace"
        )
        try:
            while self._waiting:
                written = self._file.write(self._waiting) or 0
                self._bytes += written
                self._waiting = self._waiting[written:]
        except OSError as error:
            logging.getLogger("qwen_ds").warning("%s: %s", self._path, error)

    def position(self) -> int:
        """Length of the file in bytes, all on the disk, since a checkpoint records it."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            logging.getLogger("qwen_ds").warning("%s: %s", self._path, error)
        return self._bytes

    def close(self) -> None:
        self._file.close()
