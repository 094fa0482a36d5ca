"""Requests to the decoding engine, and the updates that each step brings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from qwen_ds.decode.exceptions import DecodingError, EmptyPrompt, PromptTooLong
from qwen_ds.decode.grammar import Grammar
from qwen_ds.decode.sampler import TokenLogprobs
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.stop import FinishReason, StopRule


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The properties of a tokenizer that decoding needs."""

    size: int  # number of tokens; the head's rows beyond it are padding and are never chosen
    decode: Callable[[Sequence[int]], str]
    token_bytes: Callable[[int], bytes]
    first_special: int | None = None  # ids from here on are control tokens; None: none is

    def text_bytes(self, token: int) -> bytes:
        """The bytes of an ordinary token; none of a control token."""
        is_special = self.first_special is not None and token >= self.first_special
        return b"" if is_special else self.token_bytes(token)


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt of at least one token, and how to answer it."""

    prompt: Sequence[int]
    sampling: SamplingParams
    stop: StopRule
    adapter: str | None = None  # None: the bare base
    choose: Callable[[Tensor], int] | None = None
    """A way of one's own from logits_V (fp32) to the next token, in place of `sampling`'s."""
    stop_strings: tuple[str, ...] = ()  # texts that end the answer, and are no part of it
    grammar: Grammar | None = None  # what the answer is held to
    skip_special_tokens: bool = False  # control tokens have no text

    @property
    def ends(self) -> StopRule:
        """The stops that count."""
        return StopRule(sequences=self.stop.sequences) if self.sampling.ignore_eos else self.stop

    def require_room(self, context: int) -> None:
        """Raise EmptyPrompt, or PromptTooLong unless prompt and new tokens fit a context of so many
        tokens."""
        if not self.prompt:
            raise EmptyPrompt
        room = context - self.sampling.max_new_tokens
        if len(self.prompt) > room:
            raise PromptTooLong(len(self.prompt), room)


@dataclass(frozen=True, slots=True)
class PromptFigures:
    """Figures of a prompt that has been run."""

    cached_tokens: int  # that were there already
    logprobs: tuple[TokenLogprobs, ...] = ()  # of all its tokens but the first, where asked for


@dataclass(frozen=True, slots=True)
class Update:
    """One request's share of a step: a new token, its end, or both."""

    id: int
    token: int | None  # None: the request ended without one
    text: str = ""  # that is certain by now and was not told yet
    finish_reason: FinishReason | None = None  # None: it goes on
    error: DecodingError | None = None  # why this request failed alone
    logprobs: TokenLogprobs | None = None  # of the token, where the request asks for them
    prompt: PromptFigures | None = None  # with the first token
    stop_tokens: int = 0  # at the end: how many of the last tokens are the stop


@dataclass(frozen=True, slots=True)
class Completion:
    """One row's answer."""

    ids: tuple[int, ...]  # the new tokens, without the stop that ended them
    # Bytes that are no whole UTF-8 character show as U+FFFD: a cut answer may end inside one.
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()  # of the ids, where the request asks for them
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the prompt's tokens but the first, as well


@dataclass(slots=True)
class EngineFigures:
    """Counts since the engine began."""

    steps: int = 0
    prefilled_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    put_back: int = 0  # requests that lost their pages to older ones and began again
    largest_batch: int = 0
