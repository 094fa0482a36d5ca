"""Ctrl-C in a chat: it interrupts a wait, or else is found at the next look."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from qwen_ds import signals


class Interrupts:
    """The state of Ctrl-C. A step of the engine is never cut: it would leave a row half done."""

    def __init__(self) -> None:
        self._came = self._waits = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Take Ctrl-C from now on; other signals still end the command."""
        signals.handle(self._handle)
        yield

    def _handle(self, number: int) -> None:
        if number != signal.SIGINT:
            raise signals.Stopped(number)
        self._came = True
        if self._waits:
            self._waits = False
            raise KeyboardInterrupt

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let Ctrl-C raise KeyboardInterrupt in the block, for a wait that may be long."""
        try:
            self._waits = True
            if self._came:
                raise KeyboardInterrupt
            yield
        finally:
            self._waits = False

    @property
    def came(self) -> bool:
        """Whether Ctrl-C has come since it was last taken."""
        return self._came

    def take(self) -> bool:
        """As `came`, and forget it."""
        came, self._came = self._came, False
        return came
