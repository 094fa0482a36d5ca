"""The choice of the next token: every row by its own parameters and its own random numbers.

The functions are pure: tokens follow from logits, parameters and uniform numbers alone. Who else is
in the batch, and on which rank, plays no part.

Shapes: B rows, G rows drawn together, V rows of the head, N candidates of a row, S decoding steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np
import torch
from torch import Tensor

from qwen_ds.decode.exceptions import InvalidSampling

PREFILTER = 1024  # candidates that top-p tries before it sorts the whole vocabulary
MAX_LOGPROBS = 20
# fp32 divides by nothing smaller without overflow; a temperature near 0 takes the most probable.
_COLDEST = 1e-30
_CACHED = 2**19  # fp32 numbers: 2 MB


@dataclass(frozen=True)
class SamplingParams:
    """How the next token of one row is chosen. The defaults are the original project's.

    The logits change in this order: bias, bans, penalties, grammar, temperature; then top_k, top_p
    and min_p drop candidates. InvalidSampling for a number out of its range.
    """

    do_sample: bool = False  # False: greedy, always the most probable token
    temperature: float = 0.8
    top_p: float = 0.8
    top_k: int = 50  # 0: no limit
    max_new_tokens: int = 128
    seed: int = 42
    min_p: float = 0.0  # drops tokens below this share of the most probable one's probability
    repetition_penalty: float = 1.0  # of tokens in the prompt or the answer
    presence_penalty: float = 0.0  # of tokens in the answer
    frequency_penalty: float = 0.0  # of tokens in the answer, for each time they are in it
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what its logit gets)
    min_tokens: int = 0  # no stop token before so many others
    ignore_eos: bool = False  # decoding goes on after a stop token
    logprobs: int | None = None  # alternatives to report for each new token; None: nothing
    prompt_logprobs: int | None = None  # the same for each token of the prompt

    def __post_init__(self) -> None:
        above_0 = "a number above 0"
        at_most = f"0 to {MAX_LOGPROBS} alternatives"
        # Every comparison with NaN is false.
        checks = (
            ("temperature", 0 < self.temperature < inf, above_0 + " (do_sample false is greedy)"),
            ("top_p", 0 < self.top_p <= 1, above_0 + " and at most 1"),
            ("top_k", self.top_k >= 0, "0 (no limit) or more"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < inf, above_0),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "-2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 to 2"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_new_tokens, "0 to max_new_tokens"),
            ("logprobs", 0 <= (self.logprobs or 0) <= MAX_LOGPROBS, at_most),
            ("prompt_logprobs", 0 <= (self.prompt_logprobs or 0) <= MAX_LOGPROBS, at_most),
        )
        for name, is_right, expected in checks:
            if not is_right:
                raise InvalidSampling(name, vars(self)[name], expected)
        for token, bias in self.logit_bias:
            if token < 0 or not -100 <= bias <= 100:
                raise InvalidSampling("logit_bias", (token, bias), "token ids with -100 to 100")
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise InvalidSampling("logit_bias", self.logit_bias, "each token once")

    def of_row(self, row_id: int) -> SamplingParams:
        """The parameters of one of many rows, with a seed of its own."""
        return replace(self, seed=row_seed(self.seed, row_id))


def row_seed(seed: int, row_id: int) -> int:
    """A seed of 63 bits, hashed so that neighbouring rows and seeds share no stream."""
    digest = hashlib.blake2b(f"{seed}:{row_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniforms(rows: Sequence[SamplingParams], device: torch.device) -> Tensor:
    """All random numbers of a batch, uniform_BS in [0, 1), zeros after a row's max_new_tokens.

    Each row has a generator of its own on the CPU, so they are the same on every device.
    """
    uniform_BS = torch.zeros(len(rows), max(row.max_new_tokens for row in rows))
    for row, uniform_S in zip(rows, uniform_BS, strict=True):
        if row.do_sample:
            generator = torch.Generator().manual_seed(row.seed)
            uniform_S[: row.max_new_tokens] = torch.rand(row.max_new_tokens, generator=generator)
    return uniform_BS.to(device)


@dataclass(frozen=True, slots=True)
class SamplingGroup:
    """G rows of a batch that are drawn together: their parameters, on the device."""

    index_G: Tensor  # int64, places in the batch
    top_k: int
    temperature_G1: Tensor  # fp32
    top_p_G1: Tensor  # fp32
    min_p_G1: Tensor  # fp32


def sampling_groups(
    rows: Sequence[SamplingParams], device: torch.device
) -> tuple[SamplingGroup, ...]:
    """The sampled rows, grouped by top_k; greedy rows are in no group.

    With one top_k for all, candidates need no padding. A softmax over padded ones may sum in
    another order, and then a row's last bits would depend on the batch.
    """
    groups = []
    for top_k in sorted({row.top_k for row in rows if row.do_sample}):
        members = [i for i, row in enumerate(rows) if row.do_sample and row.top_k == top_k]
        columns = [[rows[i].temperature, rows[i].top_p, rows[i].min_p] for i in members]
        parameters_G3 = torch.tensor(columns, dtype=torch.float32, device=device)
        temperature_G1, top_p_G1, min_p_G1 = parameters_G3.split(1, dim=1)
        index_G = torch.tensor(members, device=device)
        temperature_G1 = temperature_G1.clamp(min=_COLDEST)
        groups.append(SamplingGroup(index_G, top_k, temperature_G1, top_p_G1, min_p_G1))
    return tuple(groups)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens that some rows of a group may draw, the most probable first."""

    place_C: Tensor  # int64, the rows' places in the group
    ids_CN: Tensor  # int64
    probs_CN: Tensor  # fp32, not renormalised
    cumulative_CN: Tensor  # fp32, their sums from the front
    kept_C1: Tensor  # int64: the first so many may be drawn, at least one


def candidates(scaled_GV: Tensor, group: SamplingGroup) -> Iterator[Candidates]:
    """Top-k, then top-p, then min-p on fp32 logits divided by the temperature; every row comes
    once.

    A token stays if the more probable ones together have less than top_p, so the first always does.
    Without a top-k the softmax runs over the whole vocabulary, but only the PREFILTER most probable
    tokens are sorted, and all of them in the rows where these do not reach top_p: the result is the
    same. Each row goes its own way; were all sorted for the sake of one, the order of equal logits
    would depend on the batch.
    """
    vocabulary = scaled_GV.shape[1]
    place_G = torch.arange(len(scaled_GV), device=scaled_GV.device)
    if 0 < group.top_k < vocabulary:
        top_GN, ids_GN = scaled_GV.topk(group.top_k)
        yield _kept(group, place_G, ids_GN, top_GN.softmax(-1))
        return
    size = min(PREFILTER, vocabulary)
    most_G1 = scaled_GV.amax(-1, keepdim=True)
    # As logsumexp has it, with the maxima at hand. Beside the first's 1 a number below e**-80 is
    # nothing, and on a CPU exp takes ten times as long for -inf.
    powers_GV = (scaled_GV - most_G1).clamp_(min=-80).exp_()
    log_sum_G1 = powers_GV.sum(-1, keepdim=True).log_().add_(most_G1)
    # No selection in vain: of a flat row not even `size` tokens like the first would reach top_p.
    reached_G1 = (most_G1 - log_sum_G1).exp() * (1.01 * size) >= group.top_p_G1
    tried_C = _where(reached_G1.squeeze(1) | (size == vocabulary), place_G)
    if len(tried_C):
        top_CN, ids_CN = _top(_rows(scaled_GV, tried_C), size)
        probs_CN = (top_CN - log_sum_G1[tried_C]).exp()
        reached_C = probs_CN.sum(-1) >= group.top_p_G1[tried_C, 0]
        reached_C |= (probs_CN[:, -1] == 0) | (size == vocabulary)  # or no other token is left
        done_C = _where(reached_C, torch.arange(len(reached_C), device=reached_C.device))
        reached_G1[tried_C] = reached_C.unsqueeze(1)
        yield _kept(group, tried_C[done_C], _rows(ids_CN, done_C), _rows(probs_CN, done_C))
    rest_C = _where(~reached_G1.squeeze(1), place_G)
    for part_C in rest_C.split(rows_at_once(scaled_GV)) if len(rest_C) else ():
        top_CN, ids_CN = _sorted(_rows(scaled_GV, part_C))
        yield _kept(group, part_C, ids_CN, (top_CN - log_sum_G1[part_C]).exp())


def _where(is_so_G: Tensor, place_G: Tensor) -> Tensor:
    """The places of rows that are so."""
    return place_G if bool(is_so_G.all()) else place_G[is_so_G]


def rows_at_once(values_GV: Tensor) -> int:
    """Rows to work on together: on a CPU so few that they stay in the caches, elsewhere all."""
    rows, columns = values_GV.shape
    if values_GV.device.type == "cpu":
        return max(torch.get_num_threads(), _CACHED // max(columns, 1), 1)
    return max(rows, 1)


def _rows(values_GV: Tensor, place_C: Tensor) -> Tensor:
    """Some rows in their order; all of them are not copied."""
    return values_GV if len(place_C) == len(values_GV) else values_GV[place_C]


def _kept(group: SamplingGroup, place_C: Tensor, ids_CN: Tensor, probs_CN: Tensor) -> Candidates:
    cumulative_CN = probs_CN.cumsum(-1)
    kept_CN = (cumulative_CN - probs_CN) < group.top_p_G1[place_C]
    # Whatever is -inf among the logits has the probability 0 and stays out, whatever min_p is.
    least_C1 = (group.min_p_G1[place_C] * probs_CN[:, :1]).clamp(min=torch.finfo().tiny)
    kept_CN &= probs_CN >= least_C1
    # Those that are kept come first, so their number is the place of the first that is not.
    dropped_CN = torch.nn.functional.pad(~kept_CN, (0, 1), value=True).view(torch.uint8)
    kept_C1 = dropped_CN.max(-1, keepdim=True).indices.clamp(min=1)
    return Candidates(place_C, ids_CN, probs_CN, cumulative_CN, kept_C1)


def _top(values_CV: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The `size` largest values in descending order, and their places.

    On a CPU only those are sorted that are at least the size-th largest of the maxima of so many
    blocks or more: `size` values must be as large. Of equal values the first then comes first, as
    in `_sorted`, and of fewer finite ones the rest is -inf.
    """
    if values_CV.device.type != "cpu":
        top_CN, places_CN = values_CV.topk(size)
        return top_CN, places_CN
    block = max(1, values_CV.shape[1] // (2 * size))
    blocks = values_CV.shape[1] // block
    maxima_CM = values_CV[:, : blocks * block].unflatten(1, (blocks, block)).amax(-1)
    least_C = maxima_CM.kthvalue(blocks - size + 1).values.clamp(min=torch.finfo().min)
    top_CN = values_CV.new_full((len(values_CV), size), -torch.inf)
    places_CN = torch.zeros(top_CN.shape, dtype=torch.int64)
    for row, (values_V, least) in enumerate(zip(values_CV, least_C.numpy(), strict=True)):
        is_below_V = values_V.numpy() < least  # NaN is not below anything
        places = torch.from_numpy(np.flatnonzero(~is_below_V))
        top_1N, order_1N = _sorted(values_V[places].unsqueeze(0))
        n = min(size, len(places))
        top_CN[row, :n] = top_1N[0, :n]
        places_CN[row, :n] = places[order_1N[0, :n]]
    return top_CN, places_CN


def _sorted(values_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Values in descending order, and their places; of equal ones the first comes first.

    On a CPU numpy sorts integers several times as fast as torch does numbers with their places: the
    upper half of each is the number, in an order of integers, and the lower half its place.
    """
    if values_CV.device.type != "cpu":
        sorted_CV, places_CV = values_CV.sort(descending=True, stable=True)
        return sorted_CV, places_CV
    bits_CV = (values_CV + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    rising_CV = bits_CV ^ ((bits_CV >> 31) & 0x7FFFFFFF)  # negative numbers lie the other way round
    keys_CV = (~rising_CV).to(torch.int64) << 32
    keys_CV |= torch.arange(values_CV.shape[1])
    np.ndarray.sort(keys_CV.numpy(), axis=-1)
    places_CV = keys_CV & 0xFFFFFFFF
    return values_CV.gather(1, places_CV), places_CV


def draw(
    logits_BV: Tensor,
    groups: Iterable[SamplingGroup],
    uniform_B: Tensor,
    *,
    may_overwrite: bool = False,
) -> Tensor:
    """Next tokens ids_B (int64): the most probable, or the inverse of the cumulative distribution.

    The logits are fp32, and uniform_B in [0, 1); greedy rows ignore theirs. Logits that may be
    overwritten save a copy; -inf among them stays -inf.
    """
    groups = tuple(groups)
    if sum(len(group.index_G) for group in groups) < len(logits_BV):
        chosen_B = logits_BV.max(-1).indices  # argmax gives the same in three times the time
    else:
        chosen_B = torch.empty(len(logits_BV), dtype=torch.int64, device=logits_BV.device)
    for group in groups:
        logits_GV = _rows(logits_BV, group.index_G)
        is_ours = may_overwrite or len(logits_GV) < len(logits_BV)
        place = logits_GV if is_ours else torch.empty_like(logits_GV)
        scaled_GV = torch.div(logits_GV, group.temperature_G1, out=place)
        for found in candidates(scaled_GV, group):
            index_C = group.index_G[found.place_C]
            total_C1 = found.cumulative_CN.gather(1, found.kept_C1 - 1)
            target_C1 = uniform_B[index_C].unsqueeze(1).to(total_C1) * total_C1
            rank_C1 = torch.searchsorted(found.cumulative_CN, target_C1, right=True)
            # Rounding must not lead beyond the last token that is kept.
            place_C1 = rank_C1.minimum(found.kept_C1 - 1)
            chosen_B[index_C] = found.ids_CN.gather(1, place_C1).squeeze(1)
    return chosen_B


def only_tokens(logits_BV: Tensor, vocabulary: int) -> Tensor:
    """fp32 logits in which the head's padding rows, ids without a token, are -inf."""
    masked_BV = logits_BV.to(torch.float32, copy=True)
    masked_BV[:, vocabulary:] = -torch.inf
    return masked_BV
