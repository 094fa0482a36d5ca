"""Weight files of the output: a block of rows at a time is read, changed and written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_ds.disk.weights import FLOAT_DTYPES
from qwen_ds.errors import UserError
from qwen_ds.export.merge_plan import MergePlan
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


def add_changed(total: dict[str, ChangedTensor], more: Mapping[str, ChangedTensor]) -> None:
    """Add the changes of further rows to those of the tensors in `total`."""
    for name, change in more.items():
        if (before := total.get(name)) is not None:
            norm_of_change = math.hypot(before.norm_of_change, change.norm_of_change)
            norm = math.hypot(before.norm, change.norm)
            change = ChangedTensor(change.kind, norm, norm_of_change)
        total[name] = change


def write_shard(
    plan: MergePlan, source: Source, target: Path, block_bytes: int, advance: Callable[[int], None]
) -> tuple[dict[str, Any], dict[str, ChangedTensor]]:
    """Write `target`, one of the plan's files; UserError if a value is not finite.

    Each block's bytes are told to `advance`. Returns the file's bytes and sha256, and the changes
    of the rows of the base that went into it.
    """
    tensors, specs = plan.base.tensors, plan.shards[target.name]
    pieces = [
        (piece, spec.dtype)
        for spec in specs
        for block in plan.layout[spec.name]
        for piece in row_ranges(tensors[block.tensor], block.first, block.last, block_bytes)
    ]
    changed: dict[str, ChangedTensor] = {}
    name, change = "", None
    with _one_thread(), BlockWriter(target, specs, plan.base.shards[0].metadata) as writer:
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
                    add_changed(changed, {name: ChangedTensor(change.kind, *norms)})
                writer.write(stored.view(torch.uint8).reshape(-1).numpy().data)
            advance(rows.num_bytes)
    return {"bytes": target.stat().st_size, "sha256": writer.sha256()}, changed


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
    changed = base if change is None else change.apply(base, rows.first)
    stored = changed.to(FLOAT_DTYPES[dtype], copy=True)
    norm = float(torch.linalg.vector_norm(base))
    norm_of_change = float(torch.linalg.vector_norm(base.sub_(stored)))
    if not math.isfinite(norm_of_change):
        raise UserError(
            f"{rows.spec.name}: rows {rows.first} to {rows.last} hold NaN or infinity after the"
            f" merge as {dtype}; expected a trained adapter and a dtype that holds its values"
        )
    return stored, (norm, norm_of_change)
