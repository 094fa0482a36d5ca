"""The choice of the next token: every row by its own parameters and its own random numbers.

The functions are pure: tokens follow from logits, parameters and uniform numbers alone. Who else is
in the batch, and on which rank, plays no part.

Shapes: B rows, V rows of the head, N candidates of a row, S decoding steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwen_ds.decode.exceptions import InvalidSampling

PREFILTER = 1024  # candidates that top-p tries before it sorts the whole vocabulary


@dataclass(frozen=True)
class SamplingParams:
    """How the next token of one row is chosen. The defaults are the original project's.

    InvalidSampling for a number out of its range.
    """

    do_sample: bool = False  # False: greedy, always the most probable token
    temperature: float = 0.8
    top_p: float = 0.8
    top_k: int = 50  # 0: no limit
    max_new_tokens: int = 128
    seed: int = 42

    def __post_init__(self) -> None:
        above_0 = "a number above 0 (do_sample false is greedy)"
        checks = (
            ("temperature", self.temperature > 0, above_0),
            ("top_p", 0 < self.top_p <= 1, "a number above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (no limit) or more"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
        )
        for name, is_right, expected in checks:
            if not is_right:
                raise InvalidSampling(name, vars(self)[name], expected)

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
        temperature_G1 = torch.tensor([[rows[i].temperature] for i in members], device=device)
        top_p_G1 = torch.tensor([[rows[i].top_p] for i in members], device=device)
        index_G = torch.tensor(members, device=device)
        groups.append(SamplingGroup(index_G, top_k, temperature_G1.float(), top_p_G1.float()))
    return tuple(groups)


def candidates(logits_GV: Tensor, group: SamplingGroup) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their probabilities: temperature, then top-k, then top-p.

    A token stays if the more probable ones together have less than top_p, so the first always does.
    Without a top-k the softmax runs over the whole vocabulary, but only the PREFILTER most probable
    tokens are sorted, or all where these do not reach top_p in some row: the result is the same.

    From logits_GV (fp32) to probs_GN (fp32, descending, 0 where dropped, not renormalised) and
    ids_GN (int64).
    """
    scaled_GV = logits_GV / group.temperature_G1
    vocabulary = scaled_GV.shape[1]
    if 0 < group.top_k < vocabulary:
        top_GN, ids_GN = scaled_GV.topk(group.top_k)
        probs_GN = top_GN.softmax(-1)
    else:
        log_sum_G1 = scaled_GV.logsumexp(-1, keepdim=True)
        top_GN, ids_GN = scaled_GV.topk(min(PREFILTER, vocabulary))
        probs_GN = (top_GN - log_sum_G1).exp()
        reached_G1 = probs_GN.sum(-1, keepdim=True) >= group.top_p_G1
        if vocabulary > PREFILTER and not bool(reached_G1.all()):
            top_GN, ids_GN = scaled_GV.sort(descending=True)
            probs_GN = (top_GN - log_sum_G1).exp()
    before_GN = probs_GN.cumsum(-1) - probs_GN
    kept_GN = before_GN < group.top_p_G1
    kept_GN[:, 0] = True
    return probs_GN * kept_GN, ids_GN


def draw(logits_BV: Tensor, groups: Iterable[SamplingGroup], uniform_B: Tensor) -> Tensor:
    """Next tokens ids_B (int64): the most probable, or the inverse of the cumulative distribution.

    The logits are fp32, and uniform_B in [0, 1); greedy rows ignore theirs.
    """
    chosen_B = logits_BV.argmax(-1)
    for group in groups:
        probs_GN, ids_GN = candidates(logits_BV[group.index_G], group)
        cumulative_GN = probs_GN.cumsum(-1)
        uniform_G1 = uniform_B[group.index_G].unsqueeze(1).to(cumulative_GN)
        rank_G1 = (cumulative_GN <= uniform_G1 * cumulative_GN[:, -1:]).sum(-1, keepdim=True)
        # Rounding must not lead beyond the last token that is kept.
        last_G1 = (probs_GN > 0).sum(-1, keepdim=True) - 1
        chosen_B[group.index_G] = ids_GN.gather(1, rank_G1.minimum(last_G1)).squeeze(1)
    return chosen_B


def only_tokens(logits_BV: Tensor, vocabulary: int) -> Tensor:
    """fp32 logits in which the head's padding rows, ids without a token, are -inf."""
    masked_BV = logits_BV.to(torch.float32, copy=True)
    masked_BV[:, vocabulary:] = -torch.inf
    return masked_BV
