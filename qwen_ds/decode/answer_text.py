"""Text of one answer while it grows: whole characters, and nothing of what ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwen_ds.decode.stop import StopRule
from qwen_ds.decode.stop_text import StopText
from qwen_ds.decode.text import TextStream


class AnswerText:
    """New tokens in, text out. The pieces together are the answer.

    Tokens that may yet become a stop sequence are held back, as is text that may become a stop
    string. Before `min_tokens` nothing ends an answer.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        stop: StopRule,
        stop_strings: Sequence[str] = (),
        min_tokens: int = 0,
    ) -> None:
        self._stream = TextStream(token_bytes)
        self._strings = StopText(self._stream, stop_strings)
        self._stop, self._min_tokens = stop, min_tokens
        self._held: list[int] = []
        self._num_shown = 0

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._strings.stopped is not None

    def push(self, token: int) -> str:
        """The text that this token makes certain; may be empty."""
        self._held.append(token)
        return self._show(len(self._held) - self._stop.begun(self._held))

    def finish(self, stop_tokens: int) -> str:
        """The rest of the text; the answer's last `stop_tokens` tokens ended it."""
        return self._show(len(self._held) - stop_tokens) + self._strings.finish()

    def _show(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        pieces = []
        for token in shown:
            self._num_shown += 1
            is_early = self._num_shown <= self._min_tokens
            pieces.append((self._stream if is_early else self._strings).push(token))
        return "".join(pieces)
