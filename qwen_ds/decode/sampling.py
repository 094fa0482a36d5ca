"""The choice of the next token: every row by its own parameters and its own random numbers.

The functions are pure: tokens follow from logits, parameters and uniform numbers alone. Who else is
in the batch, and on which rank, plays no part.

Shapes: B rows, G rows drawn together, V rows of the head, N candidates of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from qwen_ds.decode.exceptions import InvalidSampling
from qwen_ds.decode.largest import in_order, most_probable, top_values
from qwen_ds.decode.transfers import on_device

PREFILTERS = (128, 1024)  # candidates that top-p tries before it sorts the whole vocabulary
MAX_LOGPROBS = 20
# fp32 divides by nothing smaller without overflow; a temperature near 0 takes the most probable.
_COLDEST = 1e-30
UNDECIDED = -3  # instead of a token


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
    min_tokens: int = 0  # so many tokens come first, and no part of a stop is among them
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
        parameters_G3 = on_device(columns, torch.float32, device)
        temperature_G1, top_p_G1, min_p_G1 = parameters_G3.split(1, dim=1)
        index_G = on_device(members, torch.int64, device)
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
    total_C1: Tensor  # fp32, the sum of the probabilities that may be drawn

    def rows(self, is_in_C: Tensor) -> Candidates:
        """Some of the rows."""
        if bool(is_in_C.all()):
            return self
        return Candidates(
            self.place_C[is_in_C], self.ids_CN[is_in_C], self.probs_CN[is_in_C],
            self.cumulative_CN[is_in_C], self.kept_C1[is_in_C], self.total_C1[is_in_C],
        )  # fmt: skip


def candidates(
    scaled_GV: Tensor, group: SamplingGroup, uniform_G1: Tensor | None = None
) -> Iterator[Candidates]:
    """Top-k, then top-p, then min-p on fp32 logits divided by the temperature; every row comes
    once.

    A token stays if the more probable ones together have less than top_p, so the first always does.
    Without a top-k the softmax runs over the whole vocabulary, but only the PREFILTERS most
    probable tokens are sorted, and all of them in the rows where these are not enough: the result
    is the same. Each row goes its own way; were all sorted for the sake of one, the order of equal
    logits would depend on the batch.

    Args:
        uniform_G1: the numbers that draw. Where one meets the same token however many less
            probable ones stay, these are not looked for, and total_C1 is near enough.
    """
    vocabulary = scaled_GV.shape[1]
    place_G = torch.arange(len(scaled_GV), device=scaled_GV.device)
    if 0 < group.top_k < vocabulary:
        top_GN, ids_GN = scaled_GV.topk(group.top_k)
        yield _kept(group, place_G, ids_GN, top_GN.softmax(-1))
        return
    most_G1, log_sum_G1 = _log_sums(scaled_GV)
    first_G1 = (most_G1 - log_sum_G1).exp()
    if uniform_G1 is None:
        uniform_G1 = torch.ones_like(first_G1)
    is_left_G = torch.ones_like(place_G, dtype=torch.bool)
    for size in PREFILTERS:
        # No selection in vain: of a flat row not even `size` tokens like the first would do.
        may_do_G1 = first_G1 * (1.01 * size) >= uniform_G1 * group.top_p_G1
        may_do_G1 |= group.min_p_G1 > 0
        tried_C = _where(is_left_G & may_do_G1.squeeze(1), place_G)
        if size >= vocabulary or not len(tried_C):
            continue
        top_CN, ids_CN = top_values(_rows(scaled_GV, tried_C), size)
        log_sum_C1 = log_sum_G1[tried_C]
        found = _kept(group, tried_C, ids_CN, (top_CN - log_sum_C1).exp())
        found, is_sure_C = _settled(found, group, uniform_G1[tried_C], log_sum_C1)
        is_left_G[tried_C] = ~is_sure_C
        yield found.rows(is_sure_C)
    rest_C = _where(is_left_G, place_G)
    at_once = 1 if scaled_GV.device.type == "cpu" else len(place_G)
    for part_C in rest_C.split(at_once) if len(rest_C) else ():
        top_CN, ids_CN = in_order(_rows(scaled_GV, part_C))
        yield _kept(group, part_C, ids_CN, (top_CN - log_sum_G1[part_C]).exp())


def _log_sums(scaled_GV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row, and its logsumexp, [G, 1]."""
    most_G1 = scaled_GV.amax(-1, keepdim=True)
    # As logsumexp has it, with the maxima at hand. Beside the first's 1 a number below e**-80 is
    # nothing, and on a CPU exp takes ten times as long for -inf.
    powers_GV = (scaled_GV - most_G1).clamp_(min=-80).exp_()
    return most_G1, powers_GV.sum(-1, keepdim=True).log_().add_(most_G1)


def _settled(
    found: Candidates, group: SamplingGroup, uniform_C1: Tensor, log_sum_C1: Tensor
) -> tuple[Candidates, Tensor]:
    """Candidates among the most probable tokens, and in which rows no other can be drawn: where one
    of these is dropped, as are all that follow, or where the number that draws meets one of these
    between both bounds of the sum of all candidates.
    """
    top_p_C1, min_p_C1 = group.top_p_G1[found.place_C], group.min_p_G1[found.place_C]
    sums_CN, size = found.cumulative_CN, found.ids_CN.shape[1]
    # The sum of all probabilities is 1 but for the rounding of log_sum, and of the numbers here.
    slack_C1 = 1e-5 + log_sum_C1.abs() * 2**-23
    # With min_p the sum may end anywhere from here on.
    least_C1 = torch.where(min_p_C1 > 0, sums_CN[:, -1:], top_p_C1) * (1 - slack_C1)
    most_C1 = (top_p_C1 + found.probs_CN[:, -1:]) * (1 + slack_C1)
    rank_C1 = torch.searchsorted(sums_CN, uniform_C1 * least_C1, right=True)
    last_C1 = torch.searchsorted(sums_CN, uniform_C1 * most_C1, right=True)
    is_whole_C1 = found.kept_C1 < size
    is_sure_C1 = is_whole_C1 | ((rank_C1 == last_C1) & (last_C1 < size))
    total_C1 = torch.where(is_whole_C1, found.total_C1, least_C1)
    return replace(found, total_C1=total_C1), is_sure_C1.squeeze(1)


def _where(is_so_G: Tensor, place_G: Tensor) -> Tensor:
    """The places of rows that are so."""
    return place_G if bool(is_so_G.all()) else place_G[is_so_G]


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
    total_C1 = cumulative_CN.gather(1, kept_C1 - 1)
    return Candidates(place_C, ids_CN, probs_CN, cumulative_CN, kept_C1, total_C1)


def draw(
    logits_BV: Tensor,
    groups: Iterable[SamplingGroup],
    uniform_B: Tensor,
    *,
    may_overwrite: bool = False,
    may_wait: bool = True,
) -> Tensor:
    """Next tokens ids_B (int64): the most probable, or the inverse of the cumulative distribution.

    The logits are fp32, and uniform_B in [0, 1); greedy rows ignore theirs. Logits that may be
    overwritten save a copy; -inf among them stays -inf. A draw that may not wait gives UNDECIDED
    where the most probable tokens do not show which one is drawn.
    """
    groups = tuple(groups)
    if sum(len(group.index_G) for group in groups) < len(logits_BV):
        chosen_B = most_probable(logits_BV)[1]
    else:
        chosen_B = torch.empty(len(logits_BV), dtype=torch.int64, device=logits_BV.device)
    for group in groups:
        logits_GV = _rows(logits_BV, group.index_G)
        is_ours = may_overwrite or len(logits_GV) < len(logits_BV)
        place = logits_GV if is_ours else torch.empty_like(logits_GV)
        scaled_GV = torch.div(logits_GV, group.temperature_G1, out=place)
        uniform_G1 = uniform_B[group.index_G].unsqueeze(1).to(scaled_GV)
        if not may_wait:
            chosen_B[group.index_G] = _drawn_at_once(scaled_GV, group, uniform_G1)
            continue
        for found in candidates(scaled_GV, group, uniform_G1):
            chosen_B[group.index_G[found.place_C]] = _drawn(found, uniform_G1[found.place_C])
    return chosen_B


def _drawn_at_once(scaled_GV: Tensor, group: SamplingGroup, uniform_G1: Tensor) -> Tensor:
    """The tokens of a group, or UNDECIDED, by operations whose shapes do not depend on any value,
    so that a GPU is never waited for."""
    columns = scaled_GV.shape[1]
    if 0 < group.top_k < columns:
        (found,) = candidates(scaled_GV, group)
        return _drawn(found, uniform_G1)
    size = min(PREFILTERS[-1], columns)
    place_G = torch.arange(len(scaled_GV), device=scaled_GV.device)
    top_GN, ids_GN = scaled_GV.topk(size)
    _, log_sum_G1 = _log_sums(scaled_GV)
    found = _kept(group, place_G, ids_GN, (top_GN - log_sum_G1).exp())
    if size == columns:
        return _drawn(found, uniform_G1)
    found, is_sure_G = _settled(found, group, uniform_G1, log_sum_G1)
    return _drawn(found, uniform_G1).masked_fill(~is_sure_G, UNDECIDED)


def _drawn(found: Candidates, uniform_C1: Tensor) -> Tensor:
    """The token of each row that its number draws, int64 [C]."""
    target_C1 = uniform_C1 * found.total_C1
    rank_C1 = torch.searchsorted(found.cumulative_CN, target_C1, right=True)
    # Rounding must not lead beyond the last token that is kept.
    return found.ids_CN.gather(1, rank_C1.minimum(found.kept_C1 - 1)).squeeze(1)


def only_tokens(logits_BV: Tensor, vocabulary: int) -> Tensor:
    """fp32 logits in which the head's padding rows, ids without a token, are -inf."""
    masked_BV = logits_BV.to(torch.float32, copy=True)
    masked_BV[:, vocabulary:] = -torch.inf
    return masked_BV
