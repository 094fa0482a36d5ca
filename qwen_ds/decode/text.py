"""Text of a growing answer: a character shows once all of its bytes are there."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Literal


class TextStream:
    """Token ids in, text out; the bytes of an incomplete character are held back.

    `errors` is that of bytes.decode, for bytes that can no longer become a character.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        errors: Literal["replace", "ignore", "strict"] = "replace",
    ) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        return self._decoder.decode(self._token_bytes(token))

    def finish(self) -> str:
        """The text of the bytes still held back, as `errors` says; the stream is then empty."""
        return self._decoder.decode(b"", final=True)
