"""Text of a growing answer: a character shows once all of its bytes are there."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Literal


class TextStream:
    """Token ids in, text out; the bytes of a character that is not whole yet are held back.

    Args:
        token_bytes: the bytes of an id.
        errors: for bytes that can no longer become a character, as in bytes.decode.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        errors: Literal["replace", "ignore", "strict"] = "replace",
    ) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, token: int) -> str:
        """The text that is whole now and was not before; may be empty."""
        return self._decoder.decode(self._token_bytes(token))

    def finish(self) -> str:
        """The text of the bytes still held back, as `errors` has it; the stream is then empty."""
        return self._decoder.decode(b"", final=True)
