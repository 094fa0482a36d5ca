"""Log-likelihoods of texts and of the letters of multiple choice, by a model here or a server.

A text is cut into pieces of PIECE characters, each measured by itself; its first token follows
nothing and does not count. So a server that counts its own tokens gives the same figure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from qwen_ds.decode.engine import DecodingEngine
from qwen_ds.decode.exceptions import DecodingError
from qwen_ds.decode.request import Completion, Request
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.stop import StopRule
from qwen_ds.errors import UserError
from qwen_ds.model.tokenizer import Encoding
from serve.endpoint.client import Call, Endpoint
from serve.endpoint.wire import Trouble
from serve.engine.engine import stream

PIECE = 2000  # characters of a text that are measured together; at most 6,000 tokens, mostly 1,300
_ASKED = SamplingParams(max_new_tokens=1)
_OF_PROMPT = SamplingParams(max_new_tokens=1, prompt_logprobs=0)


@dataclass(frozen=True, slots=True)
class PlainText:
    """A text whose likelihood is asked for."""

    text: str

    @property
    def pieces(self) -> list[str]:
        return [self.text[i : i + PIECE] for i in range(0, len(self.text), PIECE)]


@dataclass(frozen=True, slots=True)
class Choices:
    """A prompt, and the letters of which one is to follow."""

    prompt: str
    letters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TextScore:
    """-log p of a text, in nats, over so many tokens."""

    nll: float
    tokens: int


@dataclass(frozen=True, slots=True)
class ChoiceScore:
    """log p of each letter, in nats; over an endpoint without what they have in common."""

    logprobs: tuple[float, ...]


Item = PlainText | Choices
Score = TextScore | ChoiceScore
Scores = Iterator[tuple[int, Score | DecodingError]]


class Scorer(Protocol):
    """The side that knows the likelihoods: a model here, or a server."""

    def score(self, items: Iterable[Item]) -> Scores:
        """Yield (index into items, score or why there is none) as they end.

        UserError or Failed: none can be scored any more.
        """


class EngineScorer:
    """Likelihoods by a model that this process has loaded; each piece and each question is one
    prefill of the serving engine."""

    def __init__(self, engine: DecodingEngine, encoding: Encoding) -> None:
        self._engine, self._encoding = engine, encoding

    def score(self, items: Iterable[Item]) -> Scores:
        """As `Scorer.score`."""
        sums = _Sums()
        asked: list[tuple[int, list[float]]] = []  # of each request: its item, letters' log p

        def requests() -> Iterator[Request]:
            for i, item in enumerate(items):
                found = self._requests(item)
                sums.begin(i, len(found))
                for request, letters in found:
                    asked.append((i, letters))
                    yield request

        for number, found in stream(self._engine, requests()):
            i, letters = asked[number]
            yield from sums.add(i, _read(found, letters))

    def _requests(self, item: Item) -> list[tuple[Request, list[float]]]:
        stop, encode = StopRule(), self._encoding.ordinary
        if isinstance(item, PlainText):
            return [(Request(encode(one), _OF_PROMPT, stop), []) for one in item.pieces]
        ids = [encode(letter) for letter in item.letters]
        assert all(len(each) == 1 for each in ids), "a letter is one token"
        logprobs: list[float] = []
        choose = partial(_choose, [each[0] for each in ids], logprobs)
        return [(Request(encode(item.prompt), _ASKED, stop, choose=choose), logprobs)]


def _choose(ids: list[int], logprobs: list[float], logits_V: Tensor) -> int:
    """The letter that is most probable; what all of them are goes into `logprobs`."""
    found = (logits_V[ids] - torch.logsumexp(logits_V, -1)).tolist()
    logprobs[:] = found
    return ids[found.index(max(found))]


def _read(found: Completion | DecodingError, letters: list[float]) -> Score | DecodingError:
    if isinstance(found, DecodingError):
        return found
    if letters:
        return ChoiceScore(tuple(letters))
    told = found.prompt_logprobs
    return TextScore(-sum(one.logprob for one in told), len(told))


class _Sums:
    """Scores of items that come in pieces."""

    def __init__(self) -> None:
        self._left: dict[int, int] = {}
        self._sums: dict[int, TextScore] = {}

    def begin(self, i: int, pieces: int) -> None:
        self._left[i], self._sums[i] = pieces, TextScore(0.0, 0)

    def add(self, i: int, found: Score | DecodingError) -> Scores:
        """Take a piece's score; yield the item's with the last piece, or a piece's error at
        once."""
        if i not in self._left:  # another piece has failed
            return
        self._left[i] -= 1
        if isinstance(found, TextScore):
            before = self._sums[i]
            found = TextScore(before.nll + found.nll, before.tokens + found.tokens)
            self._sums[i] = found
        if self._left[i] == 0 or isinstance(found, DecodingError):
            del self._left[i], self._sums[i]
            yield i, found


class EndpointScorer:
    """Likelihoods by a server's /completions, which echoes prompts with their log-probabilities."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def score(self, items: Iterable[Item]) -> Scores:
        """As `Scorer.score`. UserError: the server does not tell a prompt's log-probabilities."""
        sums = _Sums()
        asked: list[int] = []

        def calls() -> Iterator[Call[Score]]:
            for i, item in enumerate(items):
                found = self._calls(item)
                sums.begin(i, len(found))
                for call in found:
                    asked.append(i)
                    yield call

        for number, found in self._endpoint.call(calls()):
            yield from sums.add(asked[number], found)

    def _calls(self, item: Item) -> list[Call[Score]]:
        if isinstance(item, PlainText):
            return [self._call([one], _text_score) for one in item.pieces]
        prompts = [item.prompt + letter for letter in item.letters]
        return [self._call(prompts, _choice_score)]

    def _call(self, prompts: list[str], score: Callable[[list[_Echo]], Score]) -> Call[Score]:
        body = {"model": self._endpoint.model, "prompt": prompts, "echo": True, "logprobs": 1}
        body |= {"max_tokens": 0, "temperature": 0}
        return Call("/completions", json.dumps(body).encode(), partial(_echoes, score))


@dataclass(frozen=True, slots=True)
class _Echo:
    """A prompt as a server tells it: tokens and their log-probabilities, None for the first."""

    tokens: list[str]
    logprobs: list[float | None]


def _echoes(score: Callable[[list[_Echo]], Score], url: str, raw: bytes) -> Score:
    """The score in a body. Trouble: it is cut off. UserError: a prompt is not told."""
    try:
        body = json.loads(raw)
        choices = sorted(body["choices"], key=lambda choice: choice["index"])
        found = [_echo(choice) for choice in choices]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Trouble(f"{url} answered with something else than completions", None, True) from None
    if None in found:
        raise UserError(
            f"{url} does not tell the log-probabilities of a prompt; expected a server that takes "
            "echo with logprobs (vLLM, SGLang, python -m serve.api)"
        )
    return score([one for one in found if one is not None])


def _echo(choice: dict[str, Any]) -> _Echo | None:
    """A choice's prompt; None if it is not told."""
    told = choice.get("logprobs") or {}
    tokens, logprobs = told.get("tokens") or [], told.get("token_logprobs") or []
    if len(logprobs) < 2 or logprobs[0] is not None or len(tokens) != len(logprobs):
        return None
    return _Echo(tokens, logprobs)


def _text_score(found: list[_Echo]) -> TextScore:
    (one,) = found
    told = [logprob for logprob in one.logprobs if logprob is not None]
    return TextScore(-sum(told), len(told))


def _choice_score(found: list[_Echo]) -> ChoiceScore:
    """Over the tokens after those that all prompts begin with: they may be cut anew where the
    letter follows."""
    begin = 0
    for same in zip(*(one.tokens for one in found), strict=False):
        if len(set(same)) > 1:
            break
        begin += 1
    return ChoiceScore(tuple(sum(p or 0.0 for p in one.logprobs[begin:]) for one in found))
