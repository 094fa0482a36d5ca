"""Text of one answer while it grows: whole characters, and nothing of what ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwen_ds.decode.stop import StopRule
from qwen_ds.decode.stop_text import StopText
from qwen_ds.decode.text import TextStream


class AnswerText:
    """New tokens in, text out. The pieces together are the answer.

    Tokens that may yet become a stop sequence are held back, as is text that may become a stop
    string.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        stop: StopRule,
        stop_strings: Sequence[str] = (),
    ) -> None:
        self._stream = TextStream(token_bytes)
        self._strings = StopText(self._stream, stop_strings)
        self._stop = stop
        self._held: list[int] = []

    @property
    def stop_tokens(self) -> int:
        """How many of the last tokens are a stop, and so no part of the answer."""
        return self._stop.length_of_stop(self._held)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop, or a stop string, has ended the answer."""
        return self._strings.stopped is not None or self.stop_tokens > 0

    def push(self, token: int, *, may_end: bool = True) -> str:
        """The text that this token makes certain; may be empty. A token that may not end the
        answer, as the first ones that min_tokens counts, is no part of a stop."""
        if not may_end:
            return self._stream.push(token)
        self._held.append(token)
        return self._show(len(self._held) - self._stop.begun(self._held))

    def finish(self) -> str:
        """The rest of the text, without the stop that ended it; which it may complete itself, where
        it was held back for another one's sake."""
        return self._show(len(self._held) - self.stop_tokens) + self._strings.finish()

    def _show(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        return "".join([self._strings.push(token) for token in shown])
