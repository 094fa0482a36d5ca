"""Requests that decoding refuses. Each front (a command, an HTTP API) words these for its users."""

from __future__ import annotations

from collections.abc import Collection


class DecodingError(ValueError):
    """A request that cannot be decoded."""


class InvalidSampling(DecodingError):
    """A sampling parameter out of its range."""

    def __init__(self, name: str, value: object, expected: str) -> None:
        super().__init__(f"{name} is {value}; expected {expected}")
        self.name, self.value, self.expected = name, value, expected


class InvalidGrammar(DecodingError):
    """A schema, regular expression or choice that no answer can be held to."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} is refused: {reason}")
        self.name, self.reason = name, reason


class PromptTooLong(DecodingError):
    """A prompt of `tokens` tokens, where the model's context less the new ones has `room`."""

    def __init__(self, tokens: int, room: int) -> None:
        super().__init__(f"the prompt has {tokens} tokens; expected at most {room}")
        self.tokens, self.room = tokens, room


class EmptyPrompt(DecodingError):
    """A prompt without a token."""

    def __init__(self) -> None:
        super().__init__("the prompt is empty; expected at least one token")


class LogitsNotFinite(DecodingError):
    """Logits that are NaN or infinite: from such weights, or activations that overflow float16."""

    def __init__(self) -> None:
        super().__init__("the model's logits are not finite; expected numbers")


class NoTokenLeft(DecodingError):
    """A row in which no token with a finite logit may follow: the grammar forbids all of them."""

    def __init__(self, reason: str = "") -> None:
        came = reason or "the grammar allows no token that the model could choose"
        super().__init__(f"the answer cannot go on: {came}")


class RowOutOfMemory(DecodingError):
    """A single row that does not fit the device's memory."""

    def __init__(self) -> None:
        super().__init__("one row does not fit the GPU's memory; expected fewer tokens")


class InvalidToken(DecodingError):
    """A token id that the vocabulary does not have."""

    def __init__(self, token: int, num_tokens: int) -> None:
        super().__init__(f"a token id is {token}; expected 0 to {num_tokens - 1}")
        self.token, self.num_tokens = token, num_tokens


class UnknownAdapter(DecodingError):
    """An adapter that the model does not have."""

    def __init__(self, name: str, known: Collection[str]) -> None:
        names = ", ".join(known) or "no adapter"
        super().__init__(f"the adapter is {name!r}; expected one of: {names}")
        self.name = name


class KVBudgetTooSmall(DecodingError):
    """A request of `tokens` tokens, prompt and new ones, where the memory has room for `room`."""

    def __init__(self, tokens: int, room: int) -> None:
        super().__init__(
            f"prompt and new tokens may be {tokens} tokens; expected at most {room}, for which "
            "there is memory"
        )
        self.tokens, self.room = tokens, room
