"""A grid of tokens: the few numbers of tokens with which the products of a CPU are computed.

oneDNN compiles a 16-bit product anew for each number of tokens, in 1 to 5 ms, and keeps about half
a megabyte for each. A block has some twenty products, and the head two more for each number of
targets. What is added to reach the grid are zeros, and nothing reads what becomes of them.

Shapes: B rows, T tokens of a row, N = B * T tokens, M tokens on the grid, D width.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

# Where no better numbers are known: a finer grid computes fewer zeros, a coarser one has fewer
# products.
STEP = 64
# A number that is known is taken if it makes the work greater by this much at most.
_MOST_GROWTH = 1.5
# A compiler would make code of its own for no zeros, and for one row of them.
_LEAST_ZEROS = 2


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """The numbers of tokens to which a micro-batch is padded as a whole."""

    counts: tuple[int, ...] = ()  # sorted
    step: int = STEP  # beyond the counts: its multiples

    @classmethod
    def of(cls, sizes: Iterable[int]) -> TokenGrid:
        """A grid for micro-batches that have these numbers of tokens, sorted."""
        return cls(tuple(size + _LEAST_ZEROS for size in sizes))

    def at_least(self, tokens: int) -> int:
        """The number on the grid for so many tokens."""
        stepped = -(-tokens // self.step) * self.step
        at = bisect_left(self.counts, tokens)
        if at < len(self.counts) and self.counts[at] <= max(stepped, tokens * _MOST_GROWTH):
            return self.counts[at]
        return stepped

    def flat(self, x_BTD: Tensor) -> Tensor:
        """All tokens of a micro-batch as one row, and zeros after them: [1, M, D], no view of x."""
        x_1ND = x_BTD.reshape(1, -1, x_BTD.shape[-1])
        return with_zeros(x_1ND, self.at_least(x_1ND.shape[1] + _LEAST_ZEROS))


def unflat(x_1MD: Tensor, rows: int, length: int) -> Tensor:
    """The rows again, [B, T, D]."""
    return x_1MD[0, : rows * length].unflatten(0, (rows, length))


def without_zeros(x_1MD: Tensor, tokens: int) -> Tensor:
    """The N tokens of a flat micro-batch, [1, N, D]; x [B, T, D] with N = T as it is."""
    return x_1MD if x_1MD.shape[1] == tokens else x_1MD[:, :tokens]


def with_zeros(x_1ND: Tensor, tokens: int) -> Tensor:
    """x [..., M, D], with zeros after its tokens."""
    missing = tokens - x_1ND.shape[-2]
    return x_1ND if missing == 0 else F.pad(x_1ND, (0, 0, 0, missing))


def on_grid(x_ND: Tensor) -> Tensor:
    """x [M, D], with zeros up to a multiple of STEP, where products are compiled for each number of
    tokens; elsewhere x."""
    if x_ND.device.type != "cpu" or x_ND.element_size() != 2:
        return x_ND
    return with_zeros(x_ND, -(-len(x_ND) // STEP) * STEP)
