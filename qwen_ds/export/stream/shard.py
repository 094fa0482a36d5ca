"""Write one weight file of the output: rows are read, changed and written side by side, a block at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_ds.disk.weights import FLOAT_DTYPES
from qwen_ds.errors import UserError
from qwen_ds.export.merge_plan import Plan, Shard
from qwen_ds.export.stream.blocks import BlockWriter, RowRange, row_ranges
from qwen_ds.export.stream.changes import Change, load_changes
from qwen_ds.export.stream.source import Source

# A block takes about nine times this while it is worked on (fp32 before and after, blocks read ahead, blocks waiting to
# be written), and stays in the processor's cache for most of that: of 2 MiB, its sums took a quarter longer.
BLOCK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class ChangedTensor:
    """What became of (the rows so far of) a tensor of the base: Frobenius norms of the values as stored."""

    kind: str
    norm: float
    norm_of_change: float

    def plus(self, other: ChangedTensor) -> ChangedTensor:
        """Of the rows of both."""
        norm_of_change = math.hypot(self.norm_of_change, other.norm_of_change)
        return ChangedTensor(self.kind, math.hypot(self.norm, other.norm), norm_of_change)


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """A finished file, and the norms of the rows of the base's changed tensors that went into it."""

    facts: dict[str, Any]
    changed: dict[str, ChangedTensor]


def write_shard(
    plan: Plan,
    shard: Shard,
    source: Source,
    target: Path,
    block_bytes: int,
    advance: Callable[[int], None],
) -> WrittenShard:
    """Write `shard` to the file `target`. `advance` is called with the bytes read of each block.

    Raises:
        UserError: the output's values are not finite.
    """
    pieces = [
        (piece, spec.dtype)
        for spec in shard.tensors
        for rows in plan.layout[spec.name]
        for piece in row_ranges(plan.base.tensors[rows.tensor], rows.first, rows.last, block_bytes)
    ]
    changed: dict[str, ChangedTensor] = {}
    name, change = "", None
    with _one_thread(), BlockWriter(target, shard.tensors, shard.metadata) as writer:
        blocks = source.blocks([rows for rows, _ in pieces])
        for (rows, dtype), block in zip(pieces, blocks, strict=True):
            if rows.spec.name != name:
                name = rows.spec.name
                change = load_changes(plan.adapters, name) if name in plan.changed else None
            if change is None and dtype == rows.spec.dtype:
                writer.write(block.numpy().data)
            else:
                stored, norms = _changed_block(rows, block, change, dtype)
                if change is not None:
                    after = ChangedTensor(change.kind, *norms)
                    changed[name] = changed[name].plus(after) if name in changed else after
                writer.write(stored.view(torch.uint8).reshape(-1).numpy().data)
            advance(rows.num_bytes)
    return WrittenShard({"bytes": target.stat().st_size, "sha256": writer.sha256()}, changed)


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch computes in one thread: more of them would spin while they wait, in the way of those that read, hash and
    write beside it, and products of this size are not what a merge waits for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _changed_block(
    rows: RowRange, block: Tensor, change: Change | None, dtype: str
) -> tuple[Tensor, tuple[float, float]]:
    """The rows as they are to be stored; and the norms of the base's rows and of what is different afterwards."""
    raw = block.view(FLOAT_DTYPES[rows.spec.dtype])
    shape = (rows.last - rows.first, *rows.spec.shape[1:]) if rows.spec.shape else ()
    base = raw.reshape(shape).float()
    stored = (base if change is None else change.apply(base, rows.first)).to(
        FLOAT_DTYPES[dtype], copy=True
    )
    norms = (
        float(torch.linalg.vector_norm(base)),
        float(torch.linalg.vector_norm(base.sub_(stored))),
    )
    if not math.isfinite(norms[1]):
        raise UserError(
            f"{rows.spec.name}: rows {rows.first} to {rows.last} hold NaN or infinity after the merge as {dtype};"
            " expected a trained adapter and a dtype that holds its values"
        )
    return stored, norms
