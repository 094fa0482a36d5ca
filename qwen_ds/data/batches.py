"""Batches: from token rows to the right-padded micro-batches of one optimizer step, for every rank.

One step is `rows_per_step` rows, drawn uniformly, so that steps are not biased by length. Within a
step the rows are sorted by length and cut into micro-batches of nearly equal padded tokens, so that
there is little padding and every rank does the same work. Rows count with the lengths of their
buckets (buckets.py), so that an epoch's micro-batches have few shapes. Everything here is a pure
function of (seed, epoch, step): a resumed run only names its position.

Shapes: B rows of one micro-batch, T tokens to which they are padded, N rows of one step, P target
tokens of a micro-batch.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from qwen_ds.data.buckets import bucketed
from qwen_ds.data.windows import cut_windows, deal, level_budget, width_of
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import IGNORE

# Steps from which a run knows its usual shapes, and how far a rare one may be padded to be usual.
SAMPLED_STEPS, MOST_GROWTH = 64, 2.0
# Steps by which the budget is levelled.
LEVELLED_STEPS = 16
# Padding for which the tokens of micro-batches come in few numbers (StepSampler.token_counts).
TOKENS_SHARE = 0.03


class Part(NamedTuple):
    """The rows of one entry of data.train, and how often an epoch draws each of them."""

    rows: int
    weight: float


class RowStore(Protocol):
    """The interface of token rows that batches need; `TokenRows` implements it."""

    lens: np.ndarray  # int32 [rows]: tokens of each row
    learnt: np.ndarray  # int32 [rows]: target tokens of each row, counted after the shift by one
    pad_id: int  # id of <|endoftext|>

    @property
    def parts(self) -> Sequence[Part]:
        """The data sets in the order of the rows; their row counts add up to len(self)."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels) of one row, int32 [lens[row]] each."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded ChatML rows. A label stands at its own token; only the loss shifts."""

    ids_BT: Tensor  # int64, padded with <|endoftext|>
    labels_BT: Tensor  # int64, IGNORE where a token is no target
    places_P: Tensor
    """int64, of the tokens that predict a target, in the flattened batch: `target_places`. It is
    made here and travels with the batch, since a GPU would have to be waited for."""
    row_ids: tuple[int, ...]
    """Indices of the rows, so that a bad loss can name their file:line. Empty for a dummy row."""

    @property
    def num_targets(self) -> int:
        """Target tokens, counted after the shift by one."""
        return len(self.places_P)

    def pinned(self) -> Batch:
        """The batch in page-locked memory, from which a GPU can copy asynchronously."""
        tensors = self.ids_BT.pin_memory(), self.labels_BT.pin_memory(), self.places_P.pin_memory()
        return Batch(*tensors, self.row_ids)


def target_places(labels_BT: Tensor) -> Tensor:
    """The places b T + t whose next token is a target, int64 [P]; targets stand at places + 1."""
    is_target_BT = labels_BT[:, 1:] != IGNORE
    row, t = is_target_BT.nonzero(as_tuple=True)
    return row * labels_BT.shape[1] + t


@dataclass(frozen=True, slots=True)
class WindowStatistics:
    """Size, padding and balance of one optimizer step over all ranks."""

    rows: int
    tokens: int  # real tokens of all ranks
    squared_tokens: int
    """Sum of the rows' squared lengths, to which attention's work is proportional."""
    padded_tokens: int  # computed tokens of all ranks, dummy rows included
    micro_batches: int  # micro-batches of each rank
    imbalance: float  # padded tokens of the busiest rank over the ranks' mean, at least 1


def epoch_order(parts: Sequence[Part], seed: int, epoch: int) -> np.ndarray:
    """int64: the rows that an epoch draws, in order.

    A part of weight w gives round(w * rows) draws (at least one) to each epoch. Its draws run
    through one shuffled pass over its rows after another, across epochs: at weight 2 each row comes
    twice an epoch, at 0.5 the second epoch takes the half that the first left out. All draws of an
    epoch are then shuffled together, so that each step is a uniform sample.
    """
    draws, first_row = [], 0
    for number, part in enumerate(parts):
        if part.rows:
            draws.append(first_row + _draws(part, [seed, 1, number], epoch))
        first_row += part.rows
    drawn = np.concatenate(draws)
    # 0 here and 1 above keep the streams of epochs apart from those of parts.
    return _generator([seed, 0, epoch]).permutation(drawn)


def _generator(key: list[int]) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def _draws(part: Part, key: list[int], epoch: int) -> np.ndarray:
    count = _draws_per_epoch(part)
    first_pass, start = divmod(epoch * count, part.rows)
    passes = [
        _generator([*key, number]).permutation(part.rows)
        for number in range(first_pass, math.ceil((epoch + 1) * count / part.rows))
    ]
    return np.concatenate(passes)[start : start + count]


def _draws_per_epoch(part: Part) -> int:
    return max(1, round(part.weight * part.rows)) if part.rows else 0


class StepSampler:
    """The micro-batches of each optimizer step. UserError if there are no rows.

    A step has `rows_per_step` rows over all ranks, in an order by `seed` that depends neither on
    the world size nor on the token budget. An incomplete last step is trained too, and a data set
    smaller than one step is one step. A micro-batch has at most `budget` padded tokens, but a
    longer row runs alone.

    Args:
        levels: whether micro-batches may be smaller than the budget allows, where that saves
            padding (`level_budget`): where they cost no communication of their own.
    """

    def __init__(
        self,
        rows: RowStore,
        rows_per_step: int,
        seed: int,
        world: int,
        rank: int,
        budget: int,
        *,
        levels: bool = False,
    ) -> None:
        if not len(rows):
            raise UserError("there are no rows to train on; expected one at least, in data.train")
        assert 0 <= rank < world, (rank, world)
        assert sum(part.rows for part in rows.parts) == len(rows), "parts must cover the rows"
        self.rows, self.rows_per_step, self.seed = rows, rows_per_step, seed
        self.world, self.rank, self.budget = world, rank, budget
        self.rows_per_epoch = sum(_draws_per_epoch(part) for part in rows.parts)
        self.padded_lens = bucketed(rows.lens)
        # Every step needs the epoch's order; window() and statistics() both need the step's plan.
        self._order = lru_cache(maxsize=1)(partial(epoch_order, rows.parts, seed))
        self._plan = lru_cache(maxsize=2)(self._plan_step)
        if levels:
            first = range(min(LEVELLED_STEPS, self.steps_per_epoch))
            lens = [self.padded_lens[self.step_rows(0, step)] for step in first]
            self.budget = level_budget(lens, world, budget)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows_per_epoch / self.rows_per_step)

    def step_rows(self, epoch: int, step: int) -> np.ndarray:
        """int64 [N]: the rows of one step over all ranks, before they are sorted."""
        assert 0 <= step < self.steps_per_epoch, (step, self.steps_per_epoch)
        return self._order(epoch)[step * self.rows_per_step : (step + 1) * self.rows_per_step]

    def window(self, epoch: int, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, longest rows first; all ranks have equally many."""
        parts = self.plan(epoch, step)[self.rank]
        return [make_batch(self.rows, part, self.width(part)) for part in parts]

    def plan(self, epoch: int, step: int) -> list[list[np.ndarray]]:
        """The rows of each rank's micro-batches of a step, int64; alike on every rank."""
        return self._plan(epoch, step)

    def size(self, part: np.ndarray) -> int:
        """Padded tokens of a micro-batch."""
        return max(1, len(part)) * self.width(part)

    def width(self, part: np.ndarray) -> int:
        """Tokens to which the rows of a micro-batch are padded.

        That of the longest bucket among them, or the next one at which so many rows are usual: the
        last step of an epoch has fewer rows, and would bring shapes of its own. A single row does
        not grow beyond the budget.
        """
        needed = width_of(self.padded_lens, part)
        usual = self._usual.get(len(part), [])
        most = needed * MOST_GROWTH
        if len(part) == 1:  # more rows of a usual width are within the budget
            most = min(most, max(needed, self.budget))
        at = bisect_left(usual, needed)
        return needed if at == len(usual) or usual[at] > most else usual[at]

    @property
    def token_counts(self) -> tuple[int, ...]:
        """A few numbers of tokens, sorted, to which all micro-batches could be padded as a whole,
        for TOKENS_SHARE more of them."""
        sizes = np.array([self.size(part) for part in self._first_parts], np.int32)
        return tuple(np.unique(bucketed(sizes, TOKENS_SHARE)).tolist())

    @cached_property
    def _usual(self) -> dict[int, list[int]]:
        """The widths of micro-batches in the first steps, sorted, by their number of rows."""
        found: dict[int, set[int]] = {}
        for part in self._first_parts:
            found.setdefault(len(part), set()).add(width_of(self.padded_lens, part))
        return {rows: sorted(widths) for rows, widths in found.items()}

    @cached_property
    def _first_parts(self) -> list[np.ndarray]:
        """The rows of the micro-batches of the first steps, of all ranks."""
        steps = range(min(SAMPLED_STEPS, self.steps_per_epoch))
        plans = (self._plan_step(0, step) for step in steps)
        return [part for ranks in plans for parts in ranks for part in parts]

    def statistics(self, epoch: int, step: int) -> WindowStatistics:
        """The statistics of one step over all ranks, computed from lengths without a collective."""
        lens = self.rows.lens
        ranks = self.plan(epoch, step)
        padded = [sum(map(self.size, parts)) for parts in ranks]
        row_ids = np.concatenate([part for parts in ranks for part in parts])
        return WindowStatistics(
            rows=len(row_ids),
            tokens=int(lens[row_ids].sum()),
            squared_tokens=int((lens[row_ids].astype(np.int64) ** 2).sum()),
            padded_tokens=sum(padded),
            micro_batches=len(ranks[0]),
            imbalance=max(padded) * self.world / sum(padded),
        )

    def _plan_step(self, epoch: int, step: int) -> list[list[np.ndarray]]:
        return _plan(self.padded_lens, self.step_rows(epoch, step), self.world, self.budget)


def _plan(lens: np.ndarray, row_ids: np.ndarray, world: int, budget: int) -> list[list[np.ndarray]]:
    """The micro-batches of each rank, as arrays of row ids."""
    lens_N = lens[row_ids]
    ranks = deal(lens_N, cut_windows(lens_N, world, budget), world)
    return [[row_ids[part] for part in parts] for parts in ranks]


def evaluation_batches(rows: RowStore, world: int, rank: int, budget: int) -> Iterator[Batch]:
    """This rank's micro-batches of an evaluation. All ranks have equally many, and together every
    row once, whatever its weight."""
    padded_lens = bucketed(rows.lens)
    for part in _plan(padded_lens, np.arange(len(rows)), world, budget)[rank]:
        yield make_batch(rows, part, width_of(padded_lens, part))


def make_batch(rows: RowStore, row_ids: np.ndarray, width: int | None = None) -> Batch:
    """Read rows and pad them to `width` tokens, or to the longest; without row ids, make the dummy
    row."""
    width = width or width_of(rows.lens, row_ids)
    ids_BT = torch.full((max(1, len(row_ids)), width), rows.pad_id, dtype=torch.int64)
    labels_BT = torch.full_like(ids_BT, IGNORE)
    for b, row in enumerate(row_ids.tolist()):
        ids, labels = rows[row]
        ids_BT[b, : len(ids)] = torch.from_numpy(ids)
        labels_BT[b, : len(labels)] = torch.from_numpy(labels)
    return Batch(ids_BT, labels_BT, target_places(labels_BT), tuple(row_ids.tolist()))
