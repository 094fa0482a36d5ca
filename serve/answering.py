"""Questions of files and their answers, whoever gives them: the engine here, or a server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qwen_ds.decode.engine import DecodingEngine
from qwen_ds.decode.exceptions import DecodingError
from qwen_ds.decode.grammar import Grammar
from qwen_ds.decode.request import Completion, Request
from qwen_ds.decode.sampler import TokenLogprobs
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.model.chatml import Conversation
from serve.engine.engine import ServingEngine, stream
from serve.engine.reference_loss import ReferenceLosses
from serve.structure import Structure

_LEAST_LOGPROB = -9999.0  # JSON has no infinity; vLLM writes the same


@dataclass(frozen=True, slots=True)
class Question:
    """One row to answer."""

    asked: Conversation | str  # str: a prompt without turns, as base models have it
    sampling: SamplingParams
    ids: Sequence[int] = ()  # of the prompt; none where a server encodes it
    adapter: str | None = None  # of those of a model here
    stop_strings: tuple[str, ...] = ()
    structure: Structure | None = None  # what the answer is held to
    reference: str | None = None  # an answer whose loss is wanted, too
    reference_ids: Sequence[int] = ()  # of that, as `ids`


@dataclass(frozen=True, slots=True)
class Answer:
    """One row's answer, with None for what a server does not count."""

    text: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    logprobs: list[dict[str, Any]] | None = None  # of each token, as OpenAI's API has them
    reference_nll: float | None = None  # -log p of the reference in nats, a sum over its tokens
    reference_tokens: int | None = None  # the one that ends it included


class Answerer(Protocol):
    """The side that answers: a model here, or a server."""

    def answer(self, questions: Iterable[Question]) -> Iterator[tuple[int, Answer | DecodingError]]:
        """Yield (index into questions, answer or why there is none) as they end; questions are
        taken when there is room for more.

        UserError or Failed: no question can be answered any more.
        """


class EngineAnswerer:
    """Answers of a model that this process has loaded, as its rows end.

    Args:
        decoding: the engine, started.
        grammar: what the structure of the questions is compiled to.
    """

    def __init__(
        self, engine: ServingEngine, decoding: DecodingEngine, grammar: Grammar | None = None
    ) -> None:
        self._stop, self._token_bytes = engine.stop, engine.vocabulary.token_bytes
        self.decoding, self._grammar = decoding, grammar
        self._losses = ReferenceLosses(engine)
        self._asked: dict[int, Question] = {}

    def answer(self, questions: Iterable[Question]) -> Iterator[tuple[int, Answer | DecodingError]]:
        """As `Answerer.answer`."""
        requests = (self._request(*numbered) for numbered in enumerate(questions))
        for i, found in stream(self.decoding, requests):
            one = self._asked.pop(i)
            yield i, self._answer(one, found) if isinstance(found, Completion) else found

    def _request(self, number: int, one: Question) -> Request:
        self._asked[number] = one
        return Request(
            one.ids, one.sampling, self._stop, one.adapter,
            stop_strings=one.stop_strings, grammar=self._grammar,
        )  # fmt: skip

    def _answer(self, one: Question, found: Completion) -> Answer:
        logprobs = [as_json(each, self._token_bytes) for each in found.logprobs]
        counts = found.prompt_tokens, len(found.ids)
        loss = self._losses.of(one.ids, one.reference_ids, one.adapter)
        told = (None, None) if loss is None else (loss, len(one.reference_ids))
        return Answer(found.text, found.finish_reason, *counts, logprobs or None, *told)


def as_json(one: TokenLogprobs, token_bytes: Callable[[int], bytes]) -> dict[str, Any]:
    """A token's log-probabilities as OpenAI's API has them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(token)
        told = max(logprob, _LEAST_LOGPROB)
        return {"token": raw.decode(errors="replace"), "bytes": list(raw), "logprob": told}

    top = [entry(token, logprob) for token, logprob in one.top]
    return entry(one.token, one.logprob) | {"top_logprobs": top}


def room_in_words(engine: DecodingEngine) -> str:
    """The memory for keys and values of an engine that has started, in tokens."""
    store = engine.store
    tokens = store.num_pages * store.page_size
    gigabytes = tokens * store.shape.bytes_per_token / 1e9
    return f"room for {tokens:,} tokens of keys and values ({gigabytes:.3g} GB)"
