"""What a run says and where: a few lines for the person at the terminal, everything else into log files.

Libraries (DeepSpeed, transformers, peft) talk through `logging` and `warnings`; their lines go to
`<output_dir>/logs/rank_N.log`, one file per rank, and the terminal of rank 0 shows what the run itself has to say.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from qwen_ds import dist

LIBRARY_LOGGERS = (
    "DeepSpeed",
    "transformers",
    "datasets",
    "huggingface_hub",
    "peft",
    "jieba",
    "matplotlib",
)


class _LastLine(logging.Handler):
    """Remembers what was logged last, for the peers of a rank that dies."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = (record.getMessage().splitlines() or [""])[0][:300]


_last_line = _LastLine()


def last_line() -> str:
    """The last line of this rank's log."""
    return _last_line.text


def say(text: str) -> None:
    """Print for the person at the terminal, once: on rank 0 only. Also into the log."""
    logging.getLogger("qwen_ds").info(text)
    if dist.rank() == 0:
        print(text, flush=True)


def log_to_file(folder: Path) -> Path:
    """Send every library's log lines and warnings of this rank to a file under `folder`; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"rank_{dist.rank()}.log"
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.addHandler(_last_line)
    for name in LIBRARY_LOGGERS:
        logger = logging.getLogger(name)
        for old in logger.handlers[:]:
            logger.removeHandler(old)
        logger.propagate = True
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    return file


class JsonLines:
    """An append-only file of one JSON object a line, flushed at once so that it can be followed.

    Args:
        keep: bytes of an earlier file that stay; what a killed run wrote after its last checkpoint is written anew.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        if path.stat().st_size > keep:
            self._file.truncate(keep)
        self._bytes = path.stat().st_size
        self._waiting = b""

    def write(self, row: dict[str, Any]) -> None:
        """A full disk does not end the training: what it does not take waits for the next line."""
        self._waiting += (json.dumps(row, ensure_ascii=False) + "\n").encode()
        try:
            while self._waiting:
                written = self._file.write(self._waiting) or 0
                self._bytes += written
                self._waiting = self._waiting[written:]
        except OSError as error:
            logging.getLogger("qwen_ds").warning("%s: %s", self._path, error)

    def position(self) -> int:
        """Bytes in the file, brought to the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            logging.getLogger("qwen_ds").warning("%s: %s", self._path, error)
        return self._bytes

    def close(self) -> None:
        self._file.close()


def is_terminal() -> bool:
    """Whether a person watches: progress bars redraw only there."""
    return sys.stderr.isatty()
