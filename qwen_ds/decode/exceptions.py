"""Requests that decoding refuses. Each front (a command, an HTTP API) words these for its users."""

from __future__ import annotations


class DecodingError(ValueError):
    """A request that cannot be decoded."""


class InvalidSampling(DecodingError):
    """A sampling parameter out of its range."""

    def __init__(self, name: str, value: float, expected: str) -> None:
        super().__init__(f"{name} is {value}; expected {expected}")
        self.name, self.value, self.expected = name, value, expected


class PromptTooLong(DecodingError):
    """A prompt of `tokens` tokens, where the model's context less the new ones has `room`."""

    def __init__(self, tokens: int, room: int) -> None:
        super().__init__(f"the prompt has {tokens} tokens; expected at most {room}")
        self.tokens, self.room = tokens, room


class LogitsNotFinite(DecodingError):
    """Logits that are NaN or infinite: from such weights, or activations that overflow float16."""

    def __init__(self) -> None:
        super().__init__("the model's logits are not finite; expected numbers")


class RowOutOfMemory(DecodingError):
    """A single row that does not fit the device's memory."""

    def __init__(self) -> None:
        super().__init__("one row does not fit the GPU's memory; expected fewer tokens")
