"""The layout of an output: each of its tensors is blocks of rows of source tensors, stacked.

The formats differ by such a table, and share the streamed merge, its checksums and its proof.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_ds.disk.shards import StoredWeights


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows first..last of a tensor; of a scalar its only one."""

    tensor: str
    first: int
    last: int

    @property
    def num_rows(self) -> int:
        return self.last - self.first


Layout = Mapping[str, tuple[RowBlock, ...]]
"""Output tensor's name -> row blocks of source tensors, stacked in this order."""


def identity(stored: StoredWeights) -> Layout:
    """The layout that keeps every tensor as it is."""
    return {name: (RowBlock(name, 0, spec.num_rows),) for name, spec in stored.tensors.items()}


def inverse(layout: Layout) -> Layout:
    """The layout of the way back.

    Source tensor -> row blocks of the output's tensors, in the order of its own rows.
    """
    placed: dict[str, list[tuple[int, RowBlock]]] = {}
    for name, blocks in layout.items():
        first = 0
        for block in blocks:
            place = RowBlock(name, first, first + block.num_rows)
            placed.setdefault(block.tensor, []).append((block.first, place))
            first = place.last
    return {
        tensor: tuple(block for _, block in sorted(found, key=lambda place: place[0]))
        for tensor, found in placed.items()
    }
