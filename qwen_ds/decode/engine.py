"""The decoding engine: requests come and go at every step, and each decodes as it would alone.

A step runs one token of each row that decodes, and pieces of prompts up to `prefill_tokens`, so
that a long prompt does not hold up the others.

In fp32 a row's greedy answer is the one that it gets alone, token for token. In bf16 the last bit
of a logit depends on the shape of the matrix products, so a near tie may go the other way.

Shapes: N tokens of a step, R tokens whose logits are due, V rows of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from qwen_ds.decode.answer_text import AnswerText
from qwen_ds.decode.exceptions import (
    DecodingError,
    InvalidToken,
    KVBudgetTooSmall,
    LogitsNotFinite,
    RowOutOfMemory,
    UnknownAdapter,
)
from qwen_ds.decode.kv import KVStore, Segment, page_keys
from qwen_ds.decode.request import EngineFigures, PromptFigures, Request, Update, Vocabulary
from qwen_ds.decode.sampler import (
    RowSampler,
    Sampled,
    TokenLogprobs,
    prepare,
    prompt_logprobs,
    sample,
    taken,
)
from qwen_ds.decode.sampling import only_tokens
from qwen_ds.decode.scheduler import EngineLimits, Running, Scheduler
from qwen_ds.decode.stop import FinishReason
from qwen_ds.decode.transfers import all_on_device

T = TypeVar("T")

Runs = Sequence[tuple[str | None, int]]  # of tokens: an adapter's name, how many


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The input of one forward pass."""

    ids_1N: Tensor  # int64
    positions_1N: Tensor  # int64, in each token's own row
    prompt_lens: Tensor | int
    """The tokens of each token's whole prompt, int64 [1, N], which decide alpha of dynamic NTK; 0
    where it is 1 in every row."""
    due_R: Tensor  # int64: places among the N whose logits are asked for
    adapters: Runs | Tensor
    """The tokens' adapters; or the number of each, int64 [N], on which the operations of the
    forward may not depend (CUDA graphs)."""
    due_adapters: Runs  # of the tokens that are due; of no account where all are
    store: KVStore


class PackedModel(Protocol):
    """A causal language model whose attention asks the store in place of a cache."""

    def __call__(self, step: PackedStep) -> Tensor:
        """Logits [R, V] of the tokens that are due."""


def packed(model: Any) -> PackedModel:
    """Call a model of transformers' form with the rows of a step packed into one sequence."""

    def forward(step: PackedStep) -> Tensor:
        logits_1RV = model(
            input_ids=step.ids_1N, position_ids=step.positions_1N, past_key_values=step.store,
            use_cache=True, prompt_lens=step.prompt_lens, logits_to_keep=step.due_R,
        ).logits  # fmt: skip
        return logits_1RV[0]

    return forward


class DecodingEngine:
    """Continuous batching over one model. `submit`, then `step` until `is_busy` is false."""

    def __init__(
        self,
        model: PackedModel,
        store: KVStore,
        vocabulary: Vocabulary,
        limits: EngineLimits,
        alpha_of: Callable[[int], int] = lambda prompt_len: 1,
        adapters: Collection[str] = (),
    ) -> None:
        """
        Args:
            alpha_of: alpha of dynamic NTK for a prompt of so many tokens.
            adapters: names of those that the model has.
        """
        self.model, self.store, self.limits = model, store, limits
        self._vocabulary, self._alpha_of, self._adapters = vocabulary, alpha_of, adapters
        self._next_id = 0
        self.figures = EngineFigures()
        self.scheduler = Scheduler(store, limits, self.figures)

    @property
    def is_busy(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def submit(self, request: Request) -> int:
        """Queue a request; its id. DecodingError for one that can never be answered."""
        request.require_room(self.limits.context)
        if request.adapter is not None and request.adapter not in self._adapters:
            raise UnknownAdapter(request.adapter, self._adapters)
        size, sampling = self._vocabulary.size, request.sampling
        for token in request.prompt:
            if not 0 <= token < size:
                raise InvalidToken(token, size)
        room = self.store.num_pages * self.store.page_size
        needed = len(request.prompt) + sampling.max_new_tokens
        if needed > room:
            raise KVBudgetTooSmall(needed, room)
        alpha, number = self._alpha_of(len(request.prompt)), self._next_id
        self._next_id += 1
        tokens, ends = list(request.prompt), request.ends
        words = self._vocabulary
        bytes_of = words.text_bytes if request.skip_special_tokens else words.token_bytes
        text = AnswerText(bytes_of, ends, request.stop_strings)
        sampler = RowSampler(sampling, tokens, size, ends.ids, request.grammar)
        keys = page_keys(tokens, self.store.page_size, request.adapter, alpha)
        one = Running(number, request, sampler, text, alpha, tokens, keys)
        self.scheduler.waiting.append(one)
        return number

    def cancel(self, request_id: int) -> bool:
        """Drop a request, whether it waits or runs; false if it has ended."""
        one = self.scheduler.find(request_id)
        if one is not None:
            self.scheduler.remove(one)
        return one is not None

    @torch.no_grad()
    def step(self) -> list[Update]:
        """One forward pass, and what it brought to whom."""
        shares = self.scheduler.next_shares()
        if not shares:
            return []
        due = [one for one, count in shares if count == one.todo]
        prepare([one.sampler for one in due])
        places = _places(shares)
        try:
            logits_RV = self.model(self._pack(shares, places))
        except torch.OutOfMemoryError:
            logits_RV = None
        if logits_RV is None:  # now that the error no longer holds what the model held
            return self._out_of_memory(shares)
        figures = self.figures
        figures.steps += 1
        figures.largest_batch = max(figures.largest_batch, len(due))
        figures.prefilled_tokens += sum(count for one, count in shares if one.todo > 1)
        updates, last = [], []
        for (one, count), its in zip(shares, places, strict=True):
            assert one.row is not None
            if one.wants_prompt and (error := self._keep_prompt(one, logits_RV[its])):
                updates.append(self._end(one, Update(one.id, None, error=error)))
                continue
            in_prompt = one.row.length < one.prompt_len
            one.row.length += count
            if in_prompt:  # no other step fills a page of it
                self.store.publish(one.row, one.keys[: one.row.length // self.store.page_size])
            if one.todo == 0:
                last.append((one, its.stop - 1))
        found = self._sample(logits_RV, last) if last else []
        for (one, _), sampled in zip(last, found, strict=True):
            updates.append(self._advance(one, sampled))
        return updates

    def _pack(self, shares: Sequence[tuple[Running, int]], places: Sequence[slice]) -> PackedStep:
        ids: list[int] = []
        positions: list[int] = []
        lens: list[int] = []
        due: list[int] = []
        segments: list[Segment] = []
        is_extended = any(one.alpha != 1 for one, _ in shares)
        numbers_due = [its.stop - its.start for its in places]
        for (one, count), number in zip(shares, numbers_due, strict=True):
            assert one.row is not None
            done = one.row.length
            segments.append(Segment(one.row, len(ids), count))
            ids += one.tokens[done : done + count]
            positions += range(done, done + count)
            lens += [one.prompt_len] * count if is_extended else []
            due += range(len(ids) - number, len(ids))
        self.store.plan(segments)
        found = all_on_device([ids, positions, lens, due], torch.int64, self.store.shape.device)
        ids_N, positions_N, lens_N, due_R = found
        names = [one.request.adapter for one, _ in shares]
        return PackedStep(
            ids_N[None],
            positions_N[None],
            lens_N[None] if is_extended else 0,
            due_R,
            _runs(names, [count for _, count in shares]),
            _runs(names, numbers_due),
            self.store,
        )

    def _keep_prompt(self, one: Running, logits_TV: Tensor) -> DecodingError | None:
        """Keep the log-probabilities of a piece of a prompt; the error if they are no numbers."""
        assert one.row is not None and one.request.sampling.prompt_logprobs is not None
        begin = one.row.length + 1
        following = one.tokens[begin : min(begin + len(logits_TV), one.prompt_len)]
        n, size = one.request.sampling.prompt_logprobs, self._vocabulary.size

        def report(begin: int, end: int) -> list[TokenLogprobs]:
            return prompt_logprobs(logits_TV[begin:end], following[begin:end], n, size)

        try:
            one.prompt_logprobs += _in_halves(report, 0, len(following))
        except LogitsNotFinite as error:
            return error
        except torch.OutOfMemoryError:
            return RowOutOfMemory()
        return None

    def _sample(self, logits_RV: Tensor, last: Sequence[tuple[Running, int]]) -> list[Sampled]:
        """The next tokens of rows, each with the place of its logits."""

        def choose(begin: int, end: int) -> list[Sampled]:
            rows, places = zip(*last[begin:end], strict=True)
            try:
                return sample(taken(logits_RV, places), [one.sampler for one in rows])
            except torch.OutOfMemoryError:
                if len(rows) > 1:
                    raise
                return [Sampled(-1, error=RowOutOfMemory())]

        found = _in_halves(choose, 0, len(last))
        for i, (one, place) in enumerate(last):
            if one.request.choose is not None and found[i].error is None:
                found[i] = self._own_choice(one, logits_RV[place : place + 1])
        return found

    def _own_choice(self, one: Running, logits_1V: Tensor) -> Sampled:
        assert one.request.choose is not None
        try:
            token = one.request.choose(only_tokens(logits_1V, self._vocabulary.size)[0])
        except torch.OutOfMemoryError:
            return Sampled(-1, error=RowOutOfMemory())
        one.sampler.tokens[-1] = token
        return Sampled(token)

    def _advance(self, one: Running, sampled: Sampled) -> Update:
        """Take a row's new token, and end the row where it ends."""
        if sampled.error is not None:
            return self._end(one, Update(one.id, None, error=sampled.error))
        one.tokens.append(sampled.token)
        self.figures.generated_tokens += 1
        new, text = one.sampler.tokens, one.text
        prompt = None
        if len(new) == 1:
            prompt = PromptFigures(one.cached_tokens, tuple(one.prompt_logprobs))
        shown = text.push(sampled.token, may_end=one.sampler.may_end)
        is_last = len(new) == one.request.sampling.max_new_tokens
        if is_last or text.is_stopped:
            shown += text.finish()
        # Asked again: text that was held back may have completed a stop string.
        reason: FinishReason | None = "stop" if text.is_stopped else "length" if is_last else None
        update = Update(
            one.id, sampled.token, shown, reason, None, sampled.logprobs, prompt,
            text.stop_tokens if reason else 0,
        )  # fmt: skip
        return self._end(one, update) if reason else update

    def _end(self, one: Running, update: Update) -> Update:
        if one.row is not None and update.error is None:
            # The next turn of a conversation begins with this answer.
            known = one.tokens[: one.row.length]
            keys = page_keys(known, self.store.page_size, one.request.adapter, one.alpha)
            self.store.publish(one.row, keys)
        self.scheduler.remove(one)
        return update

    def _out_of_memory(self, shares: Sequence[tuple[Running, int]]) -> list[Update]:
        """A step that did not fit the device: its youngest prompt fails alone, or its youngest row
        is put back."""
        torch.cuda.empty_cache()
        prompts = [one for one, count in shares if count > 1]
        if prompts or len(shares) == 1:
            one = prompts[-1] if prompts else shares[0][0]
            return [self._end(one, Update(one.id, None, error=RowOutOfMemory()))]
        self.scheduler.put_back(shares[-1][0])
        return []


def _places(shares: Sequence[tuple[Running, int]]) -> list[slice]:
    """Where each row's logits are among those that are due: of its last token, if it gets there; of
    all its tokens, if its prompt's are asked for."""
    places, start = [], 0
    for one, count in shares:
        end = start + (count if one.wants_prompt else count == one.todo)
        places.append(slice(start, end))
        start = end
    return places


def _runs(names: Sequence[str | None], counts: Sequence[int]) -> Runs:
    """Runs of tokens by adapter: those of neighbours that have the same are one."""
    pairs = groupby(zip(names, counts, strict=True), key=itemgetter(0))
    return tuple((name, sum(count for _, count in run)) for name, run in pairs)


def _in_halves(work: Callable[[int, int], list[T]], begin: int, end: int) -> list[T]:
    """Work on the rows from `begin` to `end`: on all at once, or on fewer at a time where the
    device's memory is too small. OutOfMemoryError if it is for a single row."""
    try:
        return work(begin, end)
    except torch.OutOfMemoryError:
        if end - begin < 2:
            raise
    torch.cuda.empty_cache()
    middle = (begin + end) // 2
    return _in_halves(work, begin, middle) + _in_halves(work, middle, end)
