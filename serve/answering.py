"""Questions of files and their answers, whoever gives them: the engine here, or a server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from qwen_ds.decode.engine import DecodingEngine
from qwen_ds.decode.exceptions import DecodingError
from qwen_ds.decode.request import Completion, Request
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.stop import StopRule
from qwen_ds.model.chatml import Conversation
from serve.engine.engine import stream


@dataclass(frozen=True, slots=True)
class Question:
    """One row to answer."""

    asked: Conversation | str  # str: a prompt without turns, as base models have it
    sampling: SamplingParams
    ids: Sequence[int] = ()  # of the prompt; none where a server encodes it


@dataclass(frozen=True, slots=True)
class Answer:
    """One row's answer, with None for what a server does not count."""

    text: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None


class Answerer(Protocol):
    """The side that answers: a model here, or a server."""

    def answer(self, questions: Iterable[Question]) -> Iterator[tuple[int, Answer | DecodingError]]:
        """Yield (index into questions, answer or why there is none) as they end; questions are
        taken when there is room for more.

        UserError or Failed: no question can be answered any more.
        """


class EngineAnswerer:
    """Answers of a model that this process has loaded, as its rows end."""

    def __init__(self, engine: DecodingEngine, stop: StopRule) -> None:
        self._engine, self._stop = engine, stop

    def answer(self, questions: Iterable[Question]) -> Iterator[tuple[int, Answer | DecodingError]]:
        """As `Answerer.answer`."""
        requests = (Request(one.ids, one.sampling, self._stop) for one in questions)
        for i, found in stream(self._engine, requests):
            yield i, _answer(found) if isinstance(found, Completion) else found


def _answer(found: Completion) -> Answer:
    return Answer(found.text, found.finish_reason, found.prompt_tokens, len(found.ids))
