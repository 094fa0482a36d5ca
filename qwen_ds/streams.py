"""stdout and stderr that nobody may be reading: what is printed there never ends the work.

A terminal is closed, `| head` has seen enough, the disk of a log file is full, `>&-` was given.
Everything that is worth keeping is in files.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO


class Lossy(io.TextIOWrapper):
    """A text output that is turned to /dev/null once its other end takes nothing more."""

    def __init__(self, replaced: io.TextIOWrapper) -> None:
        super().__init__(
            replaced.buffer,
            encoding=replaced.encoding,
            errors="backslashreplace",  # nor does what the encoding lacks
            line_buffering=replaced.line_buffering,
            write_through=replaced.write_through,
        )
        self._replaced = replaced  # which owns the buffer, and closes it when it is gone

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """Let /dev/null have it, and what C++ and child processes print there, too."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        super().flush()


def outlive_readers(kind: type[Lossy] = Lossy) -> None:
    """Let stdout and stderr of this process drop what cannot be written."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if vars(sys)[name] is None:  # closed when the process began
            setattr(sys, name, _null(descriptor))
    sys.stdout, sys.stderr = _lossy(sys.stdout, 1, kind), _lossy(sys.stderr, 2, kind)


def _null(descriptor: int) -> TextIO:
    """A stream to nowhere, under a descriptor that no file of ours must get: C++ prints there."""
    opened = os.open(os.devnull, os.O_RDWR)
    try:
        os.fstat(descriptor)  # a library has a file there
    except OSError:
        os.dup2(opened, descriptor)
    return os.fdopen(opened, "r" if descriptor == 0 else "w", errors="backslashreplace")


def _lossy(stream: TextIO, descriptor: int, kind: type[Lossy]) -> TextIO:
    """The stream again, which drops; unless it is somebody's own, as in a test."""
    try:
        if not isinstance(stream, io.TextIOWrapper) or stream.fileno() != descriptor:
            return stream
        stream.flush()
    except (OSError, ValueError):  # not a file, closed, or nobody reads it already
        return stream
    return kind(stream)
