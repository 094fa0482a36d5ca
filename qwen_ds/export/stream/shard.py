"""Weight files of the output: a block of rows at a time is read, changed and written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_ds.disk.weights import FLOAT_DTYPES
from qwen_ds.errors import UserError
from qwen_ds.export.merge_plan import MergePlan, Shard
from qwen_ds.export.stream.blocks import BlockWriter, RowRange, row_ranges
from qwen_ds.export.stream.changes import Change, load_changes
from qwen_ds.export.stream.source import Source

# A block takes about nine times this while it is worked on (fp32 before and after, blocks read
# ahead, blocks waiting to be written), and stays in the processor's cache for most of that: with
# 2 MiB the sums took a quarter longer.
BLOCK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class ChangedTensor:
    """The change of a tensor of the base, or of some of its rows, in Frobenius norms as stored."""

    kind: str
    norm: float
    norm_of_change: float

    def plus(self, other: ChangedTensor) -> ChangedTensor:
        """The change of the rows of both."""
        norm_of_change = math.hypot(self.norm_of_change, other.norm_of_change)
        return ChangedTensor(self.kind, math.hypot(self.norm, other.norm), norm_of_change)


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """A finished file, and the changes of the rows of the base that went into it."""

    facts: dict[str, Any]
    """bytes and sha256."""
    changed: dict[str, ChangedTensor]


def sum_changed(shards: Iterable[WrittenShard]) -> dict[str, ChangedTensor]:
    """The changes of whole tensors, whose rows may lie in several files."""
    total: dict[str, ChangedTensor] = {}
    for written in shards:
        for name, change in written.changed.items():
            total[name] = total[name].plus(change) if name in total else change
    return dict(sorted(total.items()))


def write_shard(
    plan: MergePlan,
    shard: Shard,
    source: Source,
    target: Path,
    block_bytes: int,
    advance: Callable[[int], None],
) -> WrittenShard:
    """Write `shard` to the file `target`.

    Args:
        advance: called with the bytes read of each block.

    Raises:
        UserError: the output's values are not finite.
    """
    tensors = plan.base.tensors
    pieces = [
        (piece, spec.dtype)
        for spec in shard.tensors
        for block in plan.layout[spec.name]
        for piece in row_ranges(tensors[block.tensor], block.first, block.last, block_bytes)
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
    """Let torch compute in one thread.

    More would spin while they wait, in the way of the threads that read, hash and write. Products
    of this size are not what a merge waits for.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _changed_block(
    rows: RowRange, block: Tensor, change: Change | None, dtype: str
) -> tuple[Tensor, tuple[float, float]]:
    """The rows as they are to be stored, and the norms of the base's rows and of their change."""
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
            f"{rows.spec.name}: rows {rows.first} to {rows.last} hold NaN or infinity after the"
            f" merge as {dtype}; expected a trained adapter and a dtype that holds its values"
        )
    return stored, norms
