"""Entries of the user: lines with editing and history on a terminal, or the lines of a pipe."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Protocol

from qwen_ds.errors import UserError
from qwen_ds.signals import Stopped
from qwen_ds.terminal import show
from serve.talk.interrupts import Interrupts

PROMPT, MORE = "> ", ". "


class LineSource(Protocol):
    """Where lines come from."""

    def line(self, prompt: str) -> str | None:
        """The next line without its end; None: there are no more."""


class PipeLines:
    """Lines of standard input, without a prompt."""

    def __init__(self) -> None:
        self._number = 0

    def line(self, prompt: str) -> str | None:
        """As `LineSource.line`. UserError for one that is not UTF-8."""
        raw = sys.stdin.buffer.readline()
        self._number += 1
        if not raw:
            return None
        try:
            text = raw.decode("utf-8-sig" if self._number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise UserError(
                f"standard input:{self._number}: not UTF-8; expected text in UTF-8"
            ) from None
        return text.removesuffix("\n").removesuffix("\r")


class TerminalLines:
    """Lines that are typed, by readline where Python has it.

    Ctrl-C drops the line. KeyboardInterrupt: at an empty line, after another Ctrl-C.
    """

    def __init__(self, interrupts: Interrupts) -> None:
        with suppress(ImportError):
            import readline  # noqa: F401  input() then edits by it
        self._interrupts = interrupts

    def line(self, prompt: str) -> str | None:
        """As `LineSource.line`."""
        was_interrupted = self._interrupts.take()
        while True:
            try:
                with self._interrupts.waiting():
                    return _clean(input(prompt))
            except EOFError:
                show("")
                return None
            except UnicodeDecodeError:
                show("\nnot in the terminal's encoding; expected it in that", err=True)
            except Stopped:  # another signal
                raise
            except KeyboardInterrupt:
                self._interrupts.take()
                show("")
                if not _typed() and was_interrupted:
                    raise
                if not _typed():
                    show("Ctrl-C once more, or Ctrl-D, ends the chat", err=True)
                was_interrupted = True
                prompt = PROMPT


def _typed() -> str:
    """The text in the line that was interrupted."""
    try:
        import readline
    except ImportError:
        return ""
    return readline.get_line_buffer()


def _clean(text: str) -> str:
    """The text without halves of characters, which a terminal in another encoding may send."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def read_entry(lines: LineSource) -> str | None:
    """One entry: a line, and after a backslash at its end the next one, too. None: no more."""
    entry = lines.line(PROMPT)
    while entry is not None and entry.endswith("\\"):
        more = lines.line(MORE)
        if more is None:
            return entry[:-1]
        entry = f"{entry[:-1]}\n{more}"
    return entry
