"""Text of a growing answer that ends before a stop string, of which nothing is ever shown."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_ds.decode.exceptions import InvalidSampling
from qwen_ds.decode.text import TextStream


class StopText:
    """Token ids in, text out, up to the first of several stop strings.

    Text that may yet become a stop string is held back. The string that is complete first ends the
    text, of several at once the longest; so token boundaries do not matter.
    InvalidSampling for an empty string, which would end every answer at once.
    """

    def __init__(self, stream: TextStream, stops: Sequence[str]) -> None:
        if "" in stops:
            raise InvalidSampling("stop", list(stops), "strings of at least one character")
        self.stopped: str | None = None  # the stop string that ended the text
        self._stream = stream
        # Longest first, so that it wins among those that are complete at once.
        self._watched = [_Watched(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._held = ""

    def push(self, token: int) -> str:
        """The text that this token makes certain; may be empty, and always is after a stop."""
        return self._show(self._stream.push(token))

    def finish(self) -> str:
        """The text still held back, with bytes of no whole character as the stream shows them."""
        shown = self._show(self._stream.finish()) + self._held
        self._held = ""
        return shown

    def _show(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        for i, character in enumerate(text):
            for watched in self._watched:
                if watched.completes(character):
                    seen = self._held + text[: i + 1]
                    self.stopped, self._held = watched.stop, ""
                    return seen[: -len(watched.stop)]
        self._held += text
        size = max((watched.matched for watched in self._watched), default=0)
        cut = len(self._held) - size
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


class _Watched:
    """A stop string, and how many of its characters the text ends with (Knuth, Morris, Pratt)."""

    def __init__(self, stop: str) -> None:
        self.stop, self.matched = stop, 0
        # Of each beginning of the string, how many characters at its end are those at its start.
        self._falls_to = [0, 0]
        for character in stop[1:]:
            self._falls_to.append(self._after(self._falls_to[-1], character))

    def _after(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._falls_to[matched]
        return matched + (self.stop[matched] == character)

    def completes(self, character: str) -> bool:
        self.matched = self._after(self.matched, character)
        return self.matched == len(self.stop)
