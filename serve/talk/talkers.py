"""The side that answers a chat piece by piece: a model here, or one at an endpoint."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Protocol

from qwen_ds.decode.exceptions import PromptTooLong
from qwen_ds.decode.grammar import Grammar
from qwen_ds.decode.request import Request
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import Conversation, encode_prompt
from qwen_ds.model.tokenizer import Encoding
from serve.answering import Question
from serve.endpoint.client import Endpoint
from serve.endpoint.wire import EndpointRefused
from serve.engine.adapters import DEFAULT
from serve.engine.engine import ServingEngine
from serve.structure import Structure
from serve.talk.interrupts import Interrupts

BASE = "base"
"""The name of the bare model among the adapters, unless one of them has it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer, as it comes."""

    text: str = ""
    finish_reason: str | None = None  # with the last part
    left_out: int = 0  # exchanges at the beginning that did not fit; told with the first part


Replies = Generator[Piece, None, None]


class Talker(Protocol):
    """One side of a chat."""

    def reply(self, conversation: Conversation) -> Replies:
        """Yield the answer to the last turn, a piece at least for each step that takes time.

        DecodingError: there is none. It may be closed at any piece.
        """

    def use_adapter(self, name: str) -> str:
        """Answer by this adapter from now on; "": by the same. Words about those there are.

        UserError: there is no such one, or none at all.
        """


def without_first(conversation: Conversation) -> Conversation:
    """The conversation without its oldest exchange."""
    return replace(conversation, turns=conversation.turns[2:])


class EngineTalker:
    """A model that this process has loaded. Pages of earlier turns are used again."""

    def __init__(
        self,
        engine: ServingEngine,
        encoding: Encoding,
        sampling: SamplingParams,
        memory_gb: float | None = None,
        stop_strings: tuple[str, ...] = (),
        grammar: Grammar | None = None,
    ) -> None:
        self.decoding = engine.start(slots=1, memory_gb=memory_gb)
        store = self.decoding.store
        self.room = min(engine.context, store.num_pages * store.page_size)
        self._engine, self._encoding, self._sampling = engine, encoding, sampling
        self._stop_strings, self._grammar = stop_strings, grammar
        self._replies = 0
        names = () if engine.adapters is None else engine.adapters.names
        self._adapters: dict[str, str | None] = {name: name for name in names}
        if DEFAULT not in names:
            self._adapters.setdefault(BASE, None)
        self._adapter = DEFAULT if DEFAULT in names else next(iter(self._adapters))

    @property
    def has_named_adapters(self) -> bool:
        return len(self._adapters) > 1

    def use_adapter(self, name: str) -> str:
        """As `Talker.use_adapter`."""
        if not self.has_named_adapters:
            raise UserError("/adapter: no adapter has a name; expected --adapter NAME=DIR ...")
        there = ", ".join(self._adapters)
        if name and name not in self._adapters:
            raise UserError(f"/adapter {name}: no such adapter; expected one of: {there}")
        self._adapter = name or self._adapter
        return f"adapter: {self._adapter} (of {there})"

    def reply(self, conversation: Conversation) -> Replies:
        """As `Talker.reply`."""
        ids, left_out = self._fitted(conversation)
        new_tokens = min(self._sampling.max_new_tokens, self.room - len(ids))
        sampling = replace(
            self._sampling.of_row(self._replies),
            max_new_tokens=new_tokens,
            min_tokens=min(self._sampling.min_tokens, new_tokens),
        )
        self._replies += 1  # so that a second try draws other numbers
        request = Request(
            ids, sampling, self._engine.stop, self._adapters[self._adapter],
            stop_strings=self._stop_strings, grammar=self._grammar,
        )  # fmt: skip
        number = self.decoding.submit(request)
        try:
            yield Piece(left_out=left_out)
            while self.decoding.is_busy:
                piece = Piece()  # of a step that prefills
                for update in self.decoding.step():
                    if update.error is not None:
                        raise update.error
                    piece = Piece(update.text, update.finish_reason)
                yield piece
        finally:
            self.decoding.cancel(number)

    def _fitted(self, conversation: Conversation) -> tuple[list[int], int]:
        """Ids of the prompt, without as many of the oldest exchanges as leave too little room for
        an answer; and how many those are."""
        room = self.room - min(self._sampling.max_new_tokens, self.room // 2)
        left_out = 0
        ids = encode_prompt(self._encoding, conversation)
        while len(ids) > room and len(conversation.turns) > 1:
            conversation = without_first(conversation)
            left_out += 1
            ids = encode_prompt(self._encoding, conversation)
        if len(ids) > room:
            raise PromptTooLong(len(ids), room)
        return ids, left_out


class EndpointTalker:
    """A server's model."""

    def __init__(
        self,
        endpoint: Endpoint,
        sampling: SamplingParams,
        interrupts: Interrupts,
        stop_strings: tuple[str, ...] = (),
        structure: Structure | None = None,
    ) -> None:
        self._endpoint, self._sampling, self._interrupts = endpoint, sampling, interrupts
        self._stop_strings, self._structure = stop_strings, structure
        self._replies = 0

    def use_adapter(self, name: str) -> str:
        """As `Talker.use_adapter`."""
        raise UserError("/adapter: the server has the adapters; expected another --endpoint_model")

    def reply(self, conversation: Conversation) -> Replies:
        """As `Talker.reply`. While the server finds the prompt too long, the oldest exchange is
        left out."""
        sampling, left_out = self._sampling.of_row(self._replies), 0
        self._replies += 1
        while True:
            question = Question(
                conversation, sampling,
                stop_strings=self._stop_strings, structure=self._structure,
            )  # fmt: skip
            pieces = self._endpoint.stream(question)
            try:
                with self._interrupts.waiting():
                    first = next(pieces)
                break
            except EndpointRefused as refused:
                if not refused.too_long or len(conversation.turns) == 1:
                    raise
                conversation, left_out = without_first(conversation), left_out + 1
        try:
            yield Piece(*first, left_out)
            while True:
                with self._interrupts.waiting():
                    piece = next(pieces, None)
                if piece is None:
                    return
                yield Piece(*piece)
        finally:
            pieces.close()
