"""One pass that chooses the next token of every running row, each by its own parameters.

`RowSampler` is what a row remembers; `sample` chooses. A row gets the token that it gets alone.
Only rows that ask for more than greedy or plain sampling are touched, and there only the logits in
question.

On a GPU a step waits for its tokens once, whatever rows ask for; another time only for rows that
need the whole vocabulary sorted.

Shapes: R rows, W rows worked on in fp32, P rows of a part, A rows with log-probabilities, C rows
held to a grammar, T places of a prompt, N tokens that are changed, V rows of the head, K
alternatives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen_ds.decode import grammar as grammars
from qwen_ds.decode.exceptions import (
    DecodingError,
    InvalidSampling,
    LogitsNotFinite,
    NoTokenLeft,
)
from qwen_ds.decode.grammar import Grammar
from qwen_ds.decode.largest import most_probable, rows_at_once
from qwen_ds.decode.sampling import (
    MAX_LOGPROBS,
    UNDECIDED,
    SamplingParams,
    draw,
    only_tokens,
    sampling_groups,
)
from qwen_ds.decode.transfers import all_on_device, is_apart, on_device, read, sent

_DRAWN_AT_ONCE = 64  # random numbers; the stream is the same however it is cut
_REPORTED_AT_ONCE = 64  # rows whose fp32 logits exist at a time; a prompt may have thousands
_NOT_FINITE, _NONE_LEFT = -1, -2  # instead of a token, as UNDECIDED

_groups = lru_cache(maxsize=64)(sampling_groups)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token under the model's own distribution, before any parameter changes it."""

    token: int
    logprob: float
    rank: int  # 1: no token is more probable
    top: tuple[tuple[int, float], ...]  # the most probable tokens and theirs, in this order


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of a row, or why it has none; then `token` is -1."""

    token: int
    logprobs: TokenLogprobs | None = None
    error: DecodingError | None = None


class RowSampler:
    """The state of one request: its tokens so far and what follows from them.

    Args:
        prompt: the ids whose repetition is penalised.
        num_tokens: of the vocabulary; no id from there on is ever chosen.
        stop_ids: the tokens that min_tokens holds back.
        grammar: what the answer is held to. The row goes on in a copy of its own.

    InvalidSampling for a bias of an id that the vocabulary lacks.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        num_tokens: int,
        stop_ids: Sequence[int],
        grammar: Grammar | None = None,
    ) -> None:
        for token, bias in params.logit_bias:
            if token >= num_tokens:
                raise InvalidSampling("logit_bias", (token, bias), f"token ids below {num_tokens}")
        self.params, self.num_tokens = params, num_tokens
        self.tokens: list[int] = []
        self.may_end = True  # whether the last token may end the answer
        self.grammar = None if grammar is None else grammar.copy()
        # Rows with the same `how` are drawn by the same tensors, whichever requests they are of.
        self.how = SamplingParams(
            params.do_sample, params.temperature, params.top_p, params.top_k, min_p=params.min_p
        )
        self.stop_ids = [i for i in stop_ids if 0 <= i < num_tokens]
        repeats = params.repetition_penalty != 1
        self.penalises = bool(repeats or params.presence_penalty or params.frequency_penalty)
        self.seen = _Seen([i for i in prompt if 0 <= i < num_tokens] if repeats else [])
        self._generator = torch.Generator().manual_seed(params.seed) if params.do_sample else None
        self._uniforms: list[float] = []

    @property
    def holds_back_stops(self) -> bool:
        """Whether min_tokens still forbids to end. Once a grammar is over, only the end is left."""
        is_early = len(self.tokens) < self.params.min_tokens
        return is_early and not (self.grammar is not None and self.grammar.is_over)

    @property
    def changes_logits(self) -> bool:
        return bool(
            self.grammar is not None
            or self.penalises
            or self.params.logit_bias
            or self.holds_back_stops
        )

    def uniform(self) -> float:
        """The random number of the next token: the i-th of the row's stream for its i-th token."""
        if self._generator is None:
            return 0.0
        while len(self._uniforms) <= len(self.tokens):
            drawn = torch.rand(_DRAWN_AT_ONCE, generator=self._generator)
            self._uniforms += drawn.tolist()
        return self._uniforms[len(self.tokens)]

    def accept(self, token: int) -> None:
        """Go on by a token."""
        self.may_end = not self.holds_back_stops
        self.tokens.append(token)
        if self.penalises:
            self.seen.count(token)
        if self.grammar is not None:
            self.grammar.accept(token)


class _Seen:
    """The different tokens of prompt and answer, and how often each is in the answer."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._place = {token: i for i, token in enumerate(dict.fromkeys(prompt))}
        self._ids = np.fromiter(self._place, dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)

    def count(self, token: int) -> None:
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):  # full; both double
            self._ids = np.resize(self._ids, 2 * place + 16)
            self._counts = np.concatenate((self._counts, np.zeros(place + 16, dtype=np.float32)))
        self._ids[place] = token
        self._counts[place] += 1

    def tokens(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The tokens, and how often each is in the answer."""
        return self._ids[: len(self._place)], self._counts[: len(self._place)]


def change(work_WV: Tensor, rows: Sequence[RowSampler]) -> None:
    """Bias, bans and penalties, in place on fp32 logits: each by one operation for all rows. The
    grammars' masks are not in it."""
    device = work_WV.device
    biased = [(w, *pair) for w, row in enumerate(rows) for pair in row.params.logit_bias]
    if biased:
        places, tokens, biases = zip(*biased, strict=True)
        index = tuple(all_on_device([places, tokens], torch.int64, device))
        work_WV[index] += on_device(biases, torch.float32, device)
    banned = [(w, i) for w, row in enumerate(rows) if row.holds_back_stops for i in row.stop_ids]
    if banned:
        index = tuple(all_on_device([*zip(*banned, strict=True)], torch.int64, device))
        # Not a bare number, which is copied to the device and waited for.
        work_WV.index_put_(index, work_WV.new_full((), -torch.inf))
    if penalised := [(w, row) for w, row in enumerate(rows) if row.penalises]:
        _penalise(work_WV, penalised)


def _penalise(work_WV: Tensor, placed: Sequence[tuple[int, RowSampler]]) -> None:
    ids, counts = zip(*(row.seen.tokens() for _, row in placed), strict=True)
    lens, device = [len(found) for found in ids], work_WV.device
    places = np.repeat(np.array([w for w, _ in placed]), lens)
    index_2N = sent(torch.from_numpy(np.stack((places, np.concatenate(ids)))), device)
    params = [row.params for _, row in placed]
    columns = [
        (one.repetition_penalty, one.frequency_penalty, one.presence_penalty) for one in params
    ]
    each_3N = np.repeat(np.array(columns, dtype=np.float32), lens, axis=0).T
    numbers_4N = np.concatenate((each_3N, np.concatenate(counts)[None]))
    repetition_N, frequency_N, presence_N, count_N = sent(torch.from_numpy(numbers_4N), device)
    index = tuple(index_2N)
    logits_N = work_WV[index]
    if any(one.repetition_penalty != 1 for one in params):
        less_N, more_N = logits_N * repetition_N, logits_N / repetition_N
        logits_N = torch.where(logits_N < 0, less_N, more_N)
    logits_N = logits_N - (frequency_N * count_N + presence_N * (count_N > 0))
    work_WV.index_put_(index, logits_N)


def prepare(rows: Sequence[RowSampler]) -> None:
    """Start to make the grammars' masks for the next `sample`, while the model computes."""
    grammars.start_masks([row.grammar for row in rows if row.grammar is not None])


@torch.no_grad()
def sample(logits_RV: Tensor, rows: Sequence[RowSampler]) -> list[Sampled]:
    """The next token of every row, which the row then has accepted.

    The logits are in the model's dtype and stay as they are. A row whose logits are not finite, or
    to which the grammar leaves nothing, gets its error and stays where it is; the others go on.
    """
    if not rows:
        return []
    assert len({row.num_tokens for row in rows}) == 1 and len(rows) == len(logits_RV)
    tokens, reported = _read(logits_RV, rows, may_wait=not is_apart(logits_RV.device))
    if undecided := [i for i, token in enumerate(tokens) if token == UNDECIDED]:
        logits, others = taken(logits_RV, undecided), [rows[i] for i in undecided]
        again, more = _read(logits, others, may_wait=True)
        for i, token in zip(undecided, again, strict=True):
            tokens[i] = token
        reported |= {undecided[i]: one for i, one in more.items()}
    found = []
    for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        if token == _NOT_FINITE:
            found.append(Sampled(-1, error=LogitsNotFinite()))
        elif token == _NONE_LEFT:
            found.append(Sampled(-1, error=NoTokenLeft((row.grammar and row.grammar.error) or "")))
        elif i in reported and math.isnan(reported[i].logprob):  # the head's padding is no number
            found.append(Sampled(-1, error=LogitsNotFinite()))
        else:
            row.accept(token)
            found.append(Sampled(token, reported.get(i)))
    return found


def _read(
    logits_RV: Tensor, rows: Sequence[RowSampler], *, may_wait: bool
) -> tuple[list[int], dict[int, TokenLogprobs]]:
    """The rows' tokens, and the log-probabilities of those that ask for them, by their place: all
    of it in one look at the device. A token below 0 says why there is none."""
    chosen_R = _chosen(logits_RV, rows, may_wait)
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if not asked:
        return read(chosen_R), {}
    alternatives = [rows[i].params.logprobs or 0 for i in asked]
    size = _alternatives(alternatives, rows[0].num_tokens)
    ids_A = taken(chosen_R, asked).clamp(min=0)
    reported_AK = _logprobs(taken(logits_RV, asked), ids_A, size, rows[0].num_tokens)
    numbers = read(torch.cat((chosen_R.double(), reported_AK.flatten())))
    tokens = [int(number) for number in numbers[: len(rows)]]
    ids = [tokens[i] for i in asked]
    found = _named(numbers[len(rows) :], ids, alternatives)
    return tokens, dict(zip(asked, found, strict=True))


def _chosen(logits_RV: Tensor, rows: Sequence[RowSampler], may_wait: bool) -> Tensor:
    """The rows' tokens, int64 [R], on the logits' device."""
    num_tokens, device = rows[0].num_tokens, logits_RV.device
    worked = [i for i, row in enumerate(rows) if row.params.do_sample or row.changes_logits]
    greedy = sorted(set(range(len(rows))) - set(worked))
    chosen_R = torch.empty(len(rows), dtype=torch.int64, device=device)
    if greedy:
        # Of equal logits the first, as argmax has it. NaN is the largest of all, so it shows.
        largest, best = most_probable(taken(logits_RV, greedy)[:, :num_tokens])
        best.masked_fill_(~largest.isfinite(), _NOT_FINITE)
        chosen_R[on_device(greedy, torch.int64, device)] = best
    at_once = rows_at_once(logits_RV)
    for start in range(0, len(worked), at_once):
        part = worked[start : start + at_once]
        chosen = _choose(taken(logits_RV, part), [rows[i] for i in part], may_wait)
        chosen_R[on_device(part, torch.int64, device)] = chosen
    return chosen_R


def _choose(logits_WV: Tensor, rows: Sequence[RowSampler], may_wait: bool) -> Tensor:
    """The tokens of rows that need more than their largest logit; _NOT_FINITE or _NONE_LEFT where
    there is none, UNDECIDED where a draw that may not wait finds none."""
    device, num_tokens = logits_WV.device, rows[0].num_tokens
    work_WV = only_tokens(logits_WV, num_tokens)
    is_finite_W = work_WV.amax(-1).isfinite()
    change(work_WV, rows)
    held = [(w, row.grammar) for w, row in enumerate(rows) if row.grammar is not None]
    if held:
        denied_CV = grammars.denied([grammar for _, grammar in held], device)
        for (w, _), denied_V in zip(held, denied_CV, strict=True):
            work_WV[w, :num_tokens].masked_fill_(denied_V[:num_tokens], -torch.inf)
    groups = _groups(tuple(row.how for row in rows), device)
    uniform_W = on_device([row.uniform() for row in rows], torch.float32, device)
    chosen_W = draw(work_WV, groups, uniform_W, may_overwrite=True, may_wait=may_wait)
    logit_W = work_WV.gather(1, chosen_W.clamp(min=0).unsqueeze(1)).squeeze(1)
    chosen_W.masked_fill_((logit_W == -torch.inf) & (chosen_W >= 0), _NONE_LEFT)
    return chosen_W.masked_fill_(~is_finite_W, _NOT_FINITE)


def taken(logits_RV: Tensor, part: Sequence[int]) -> Tensor:
    """Some of the rows, in rising order; neighbours are not copied."""
    if part[-1] - part[0] == len(part) - 1:
        return logits_RV[part[0] : part[-1] + 1]
    return logits_RV[on_device(part, torch.int64, logits_RV.device)]


@torch.no_grad()
def prompt_logprobs(
    logits_TV: Tensor, next_ids: Sequence[int], n: int, num_tokens: int | None = None
) -> list[TokenLogprobs]:
    """Log-probabilities of a prompt: of next_ids[t] by the logits at t, with n alternatives.

    Alternatives are ids below num_tokens, if it is given. LogitsNotFinite instead of NaN.
    """
    if not next_ids:
        return []
    num_tokens = logits_TV.shape[1] if num_tokens is None else num_tokens
    alternatives = [n] * len(next_ids)
    size = _alternatives(alternatives, num_tokens)
    ids_T = on_device(next_ids, torch.int64, logits_TV.device)
    numbers = read(_logprobs(logits_TV, ids_T, size, num_tokens).flatten())
    found = _named(numbers, next_ids, alternatives)
    if any(math.isnan(one.logprob) for one in found):
        raise LogitsNotFinite
    return found


def _alternatives(asked: Sequence[int], num_tokens: int) -> int:
    """One number for all rows: which of several equal logits come first might depend on it."""
    return min(MAX_LOGPROBS, num_tokens) if any(asked) else 0


def _logprobs(logits_RV: Tensor, ids_R: Tensor, size: int, num_tokens: int) -> Tensor:
    """Each id's log-probability, as training computes it: over all rows of the head.

    fp64 [R, 2 + 2 * size], which holds the ids exactly: the log-probability, the rank, the most
    probable ids and theirs.
    """
    parts = []
    at_once = min(rows_at_once(logits_RV), _REPORTED_AT_ONCE)
    for start in range(0, len(ids_R), at_once):
        part = slice(start, start + at_once)
        logits_PV = logits_RV[part].float()
        log_sum_P1 = logits_PV.logsumexp(-1, keepdim=True)
        log_sum_P1 = log_sum_P1.masked_fill(~log_sum_P1.isfinite(), torch.nan)
        logits_PV = logits_PV[:, :num_tokens]
        chosen_P1 = logits_PV.gather(1, ids_R[part].unsqueeze(1))
        # A sum of booleans is slow on a CPU.
        rank_P1 = (logits_PV > chosen_P1).float().sum(-1, keepdim=True) + 1
        top_PK, top_ids_PK = logits_PV.topk(size)
        columns = (chosen_P1 - log_sum_P1, rank_P1, top_ids_PK, top_PK - log_sum_P1)
        parts.append(torch.cat([column.double() for column in columns], 1))
    return torch.cat(parts)


def _named(
    numbers: Sequence[float], ids: Sequence[int], alternatives: Sequence[int]
) -> list[TokenLogprobs]:
    """The numbers of `_logprobs`, one row after the other, with as many alternatives as asked."""
    width = len(numbers) // len(ids)
    size, found = width // 2 - 1, []
    for i, (token, n) in enumerate(zip(ids, alternatives, strict=True)):
        logprob, rank, *rest = numbers[i * width : (i + 1) * width]
        top = zip(map(int, rest[:n]), rest[size : size + n], strict=True)
        found.append(TokenLogprobs(token, logprob, int(rank), tuple(top)))
    return found
