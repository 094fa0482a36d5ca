"""What a run says and where: a few lines for the person at the terminal, everything else into log files.

Libraries (DeepSpeed, transformers, peft) talk through `logging` and `warnings`; their lines go to
`<output_dir>/logs/rank_N.log`, one file per rank, and the terminal of rank 0 shows what the run itself has to say.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, TextIO

from qwen_ds import dist

LIBRARY_LOGGERS = ("DeepSpeed", "transformers", "datasets", "huggingface_hub", "peft", "jieba", "matplotlib")


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
    for name in LIBRARY_LOGGERS:
        logger = logging.getLogger(name)
        for old in logger.handlers[:]:
            logger.removeHandler(old)
        logger.propagate = True
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    return file


class JsonLines:
    """An append-only file of one JSON object a line, flushed at once so that it can be followed."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def is_terminal() -> bool:
    """Whether a person watches: progress bars redraw only there."""
    return sys.stderr.isatty()
