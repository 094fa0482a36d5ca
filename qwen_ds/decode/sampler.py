"""One pass that chooses the next token of every running row, each by its own parameters.

`RowSampler` is what a row remembers; `sample` chooses. A row gets the token that it gets alone.
Only rows that ask for more than greedy or plain sampling are touched, and there only the logits in
question.

Shapes: R rows, W rows worked on in fp32, P rows of a part, C rows held to a grammar, T places of a
prompt, V rows of the head, K alternatives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from qwen_ds.decode import grammar as grammars
from qwen_ds.decode.exceptions import (
    DecodingError,
    InvalidSampling,
    LogitsNotFinite,
    NoTokenLeft,
)
from qwen_ds.decode.grammar import Grammar
from qwen_ds.decode.sampling import (
    MAX_LOGPROBS,
    SamplingParams,
    draw,
    most_probable,
    only_tokens,
    rows_at_once,
    sampling_groups,
)

_DRAWN_AT_ONCE = 64  # random numbers; the stream is the same however it is cut
_REPORTED_AT_ONCE = 64  # rows whose fp32 logits exist at a time; a prompt may have thousands
_NOT_FINITE, _NONE_LEFT = -1, -2  # instead of a token

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
        stops = [i for i in stop_ids if 0 <= i < num_tokens]
        self._stop_ids = torch.tensor(stops, dtype=torch.int64)
        self._biased = torch.tensor([token for token, _ in params.logit_bias], dtype=torch.int64)
        self._biases = torch.tensor([bias for _, bias in params.logit_bias], dtype=torch.float32)
        repeats = params.repetition_penalty != 1
        self._penalises = bool(repeats or params.presence_penalty or params.frequency_penalty)
        self._seen = _Seen([i for i in prompt if 0 <= i < num_tokens] if repeats else [])
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
            or self._penalises
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
        if self._penalises:
            self._seen.count(token)
        if self.grammar is not None:
            self.grammar.accept(token)

    def change(self, logits_V: Tensor) -> None:
        """Bias, bans and penalties, in place on fp32 logits; the grammar's mask is not in it."""
        params, device = self.params, logits_V.device
        if params.logit_bias:
            self._biased, self._biases = self._biased.to(device), self._biases.to(device)
            logits_V[self._biased] += self._biases
        if self.holds_back_stops:
            self._stop_ids = self._stop_ids.to(device)
            logits_V[self._stop_ids] = -torch.inf
        if self._penalises:
            ids, counts = self._seen.tensors(device)
            logits = logits_V[ids]
            if params.repetition_penalty != 1:
                less, more = logits * params.repetition_penalty, logits / params.repetition_penalty
                logits = torch.where(logits < 0, less, more)
            logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
            logits_V[ids] = logits


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

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        ids, counts = self._ids[: len(self._place)], self._counts[: len(self._place)]
        return torch.from_numpy(ids).to(device), torch.from_numpy(counts).to(device)


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
    num_tokens, device = rows[0].num_tokens, logits_RV.device
    assert all(row.num_tokens == num_tokens for row in rows) and len(rows) == len(logits_RV)
    worked = [i for i, row in enumerate(rows) if row.params.do_sample or row.changes_logits]
    greedy = sorted(set(range(len(rows))) - set(worked))
    chosen_R = torch.empty(len(rows), dtype=torch.int64, device=device)
    if greedy:
        # Of equal logits the first, as argmax has it. NaN is the largest of all, so it shows.
        largest, best = most_probable(taken(logits_RV, greedy)[:, :num_tokens])
        best.masked_fill_(~largest.isfinite(), _NOT_FINITE)
        chosen_R[torch.tensor(greedy, device=device)] = best
    at_once = rows_at_once(logits_RV)
    for start in range(0, len(worked), at_once):
        part = worked[start : start + at_once]
        chosen = _choose(taken(logits_RV, part), [rows[i] for i in part])
        chosen_R[torch.tensor(part, device=device)] = chosen
    tokens = chosen_R.tolist()
    reported = _report(logits_RV, rows, tokens)
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


def _choose(logits_WV: Tensor, rows: Sequence[RowSampler]) -> Tensor:
    """The tokens of rows that need more than their largest logit; _NOT_FINITE or _NONE_LEFT where
    there is none."""
    device, num_tokens = logits_WV.device, rows[0].num_tokens
    work_WV = only_tokens(logits_WV, num_tokens)
    is_finite_W = work_WV.amax(-1).isfinite()
    for logits_V, row in zip(work_WV, rows, strict=True):
        if row.changes_logits:
            row.change(logits_V)
    held = [(w, row.grammar) for w, row in enumerate(rows) if row.grammar is not None]
    if held:
        denied_CV = grammars.denied([grammar for _, grammar in held], device)
        for (w, _), denied_V in zip(held, denied_CV, strict=True):
            work_WV[w, :num_tokens].masked_fill_(denied_V[:num_tokens], -torch.inf)
    groups = _groups(tuple(row.how for row in rows), device)
    uniform_W = torch.tensor([row.uniform() for row in rows], device=device)
    chosen_W = draw(work_WV, groups, uniform_W, may_overwrite=True)
    logit_W = work_WV.gather(1, chosen_W.unsqueeze(1)).squeeze(1)
    chosen_W.masked_fill_(logit_W == -torch.inf, _NONE_LEFT)
    return chosen_W.masked_fill_(~is_finite_W, _NOT_FINITE)


def taken(logits_RV: Tensor, part: Sequence[int]) -> Tensor:
    """Some of the rows, in rising order; neighbours are not copied."""
    if part[-1] - part[0] == len(part) - 1:
        return logits_RV[part[0] : part[-1] + 1]
    return logits_RV[torch.tensor(part, device=logits_RV.device)]


def _report(
    logits_RV: Tensor, rows: Sequence[RowSampler], tokens: Sequence[int]
) -> dict[int, TokenLogprobs]:
    """Log-probabilities for the rows that ask for them and have a token, by their place."""
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None and tokens[i] >= 0]
    if not asked:
        return {}
    alternatives = [rows[i].params.logprobs or 0 for i in asked]
    logits, chosen = taken(logits_RV, asked), [tokens[i] for i in asked]
    found = _logprobs(logits, chosen, alternatives, rows[0].num_tokens)
    return dict(zip(asked, found, strict=True))


@torch.no_grad()
def prompt_logprobs(
    logits_TV: Tensor, next_ids: Sequence[int], n: int, num_tokens: int | None = None
) -> list[TokenLogprobs]:
    """Log-probabilities of a prompt: of next_ids[t] by the logits at t, with n alternatives.

    Alternatives are ids below num_tokens, if it is given. LogitsNotFinite instead of NaN.
    """
    num_tokens = logits_TV.shape[1] if num_tokens is None else num_tokens
    found = _logprobs(logits_TV, next_ids, [n] * len(next_ids), num_tokens)
    if any(math.isnan(one.logprob) for one in found):
        raise LogitsNotFinite
    return found


def _logprobs(
    logits_RV: Tensor, ids: Sequence[int], alternatives: Sequence[int], num_tokens: int
) -> list[TokenLogprobs]:
    """Each id's log-probability, as training computes it: over all rows of the head."""
    device, found = logits_RV.device, []
    ids_R1 = torch.tensor(ids, dtype=torch.int64, device=device).unsqueeze(1)
    # One K for all: which of several equal logits come first might depend on it.
    size = min(MAX_LOGPROBS, num_tokens) if any(alternatives) else 0
    at_once = min(rows_at_once(logits_RV), _REPORTED_AT_ONCE)
    for start in range(0, len(ids), at_once):
        part = slice(start, start + at_once)
        logits_PV = logits_RV[part].float()
        log_sum_P1 = logits_PV.logsumexp(-1, keepdim=True)
        log_sum_P1[~log_sum_P1.isfinite()] = torch.nan
        logits_PV = logits_PV[:, :num_tokens]
        chosen_P1 = logits_PV.gather(1, ids_R1[part])
        # A sum of booleans is slow on a CPU.
        rank_P = (logits_PV > chosen_P1).float().sum(-1).int() + 1
        top_PK, top_ids_PK = logits_PV.topk(size)
        lines = zip(
            ids[part], (chosen_P1 - log_sum_P1).squeeze(1).tolist(), rank_P.tolist(),
            top_ids_PK.tolist(), (top_PK - log_sum_P1).tolist(), alternatives[part], strict=True,
        )  # fmt: skip
        found += [
            TokenLogprobs(token, logprob, rank, tuple(zip(top_ids[:n], top[:n], strict=True)))
            for token, logprob, rank, top_ids, top, n in lines
        ]
    return found
