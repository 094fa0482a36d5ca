"""Answers to a handful of prompts by a model at hand, such as the samples of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qwen_ds.decode.engine import DecodingEngine, packed
from qwen_ds.decode.kv import KVShape
from qwen_ds.decode.kv_rows import ContiguousStore
from qwen_ds.decode.request import Completion, Request, Update, Vocabulary
from qwen_ds.decode.sampler import TokenLogprobs
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.scheduler import EngineLimits
from qwen_ds.decode.stop import StopRule


def decode_batch(
    model: Any,
    requests: Sequence[Request],
    vocabulary: Vocabulary,
    shape: KVShape,
    alpha_of: Callable[[int], int],
    all_done: Callable[[bool], bool] = bool,
) -> list[Completion]:
    """Completions of the requests, in their order; all of them run together.

    Args:
        model: of transformers' form, see `packed`.
        all_done: called after each step with whether all requests here have ended; decoding ends
            when it returns true. Ranks that must make the same number of forward passes agree in
            it, and have the same requests.

    Raises the DecodingError of the first request that fails.
    """
    tokens = [len(one.prompt) + one.sampling.max_new_tokens for one in requests]
    store = ContiguousStore.for_rows(shape, [*tokens, 1])  # and what keeps other ranks going
    limits = EngineLimits(len(requests), sum(tokens), max(tokens))
    engine = DecodingEngine(packed(model), store, vocabulary, limits, alpha_of)
    ids = [engine.submit(request) for request in requests]
    growing = {number: GrowingAnswer(one) for number, one in zip(ids, requests, strict=True)}
    idle = Request(requests[0].prompt[:1], SamplingParams(max_new_tokens=1), StopRule())
    while True:
        for update in engine.step():
            if update.error is not None:
                raise update.error
            if update.id in growing:
                growing[update.id].add(update)
        if all_done(not engine.is_busy):
            break
        if not engine.is_busy:  # other ranks go on, and need this one's share of the weights
            engine.submit(idle)
    return [growing[number].completion() for number in ids]


class GrowingAnswer:
    """One request's answer, put together from the updates."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._last: Update | None = None
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt: tuple[TokenLogprobs, ...] = ()

    def add(self, update: Update) -> None:
        """Take what a step brought, which is no error."""
        assert update.token is not None
        self._last = update
        self._tokens.append(update.token)
        self._text.append(update.text)
        if update.logprobs is not None:
            self._logprobs.append(update.logprobs)
        if update.prompt is not None:
            self._prompt = update.prompt.logprobs

    def completion(self) -> Completion:
        """The answer, once its last update has a finish_reason."""
        ids, last = self._tokens, self._last
        assert last is not None and last.finish_reason is not None
        kept = len(ids) - last.stop_tokens
        return Completion(
            tuple(ids[:kept]), "".join(self._text), last.finish_reason, len(self.request.prompt),
            tuple(self._logprobs[:kept]), self._prompt,
        )  # fmt: skip
