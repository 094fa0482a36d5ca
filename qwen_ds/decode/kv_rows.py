"""Keys and values for CPUs: each row has memory of its own, and attention runs row by row.

Attention over a row's own memory reads what it needs and copies nothing, and a row's result does
not depend on the others. Gathering pages first took four times as long (32 rows of 60 to 400
tokens, 12 heads of 64, bf16, one thread).
Pages of another row's prompt are therefore copied, once for a request; memory grows layer by layer,
so that no more than one layer of one row is there twice.

Shapes: N new tokens, T those of one row, L its tokens in all, H heads, W head width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen_ds.decode.kv import KVShape, KVStore, PageKey, Segment, StoredRow


@dataclass(slots=True, eq=False)
class _Memory:
    """One row's keys and values: of each layer [2, 1, H, capacity, W]. Over 4,000 tokens attention
    takes 1.4 to 1.9 times as long where heads lie inside tokens."""

    layers: list[Tensor]
    pages: int = 0
    keys: list[PageKey] = field(default_factory=list)  # of the pages that others may copy


class ContiguousStore(KVStore):
    """A store whose rows lie in one piece."""

    def __init__(self, shape: KVShape, num_pages: int, page_size: int = 32) -> None:
        super().__init__(shape, num_pages, page_size)
        self._used = 0
        self._shared: dict[PageKey, tuple[_Memory, int]] = {}
        self._left: OrderedDict[int, _Memory] = OrderedDict()  # of closed rows, by id()
        self._counts: list[int] = []
        self._plan: list[tuple[list[Tensor], int, int, Tensor | None, bool]] = []

    @classmethod
    def for_rows(cls, shape: KVShape, tokens: Sequence[int]) -> ContiguousStore:
        """A store with room for rows of so many tokens each, all at once."""
        store = cls(shape, 0)
        store.num_pages = sum(map(store.pages_for, tokens))
        return store

    @property
    def available_pages(self) -> int:
        return self.num_pages - self._used + sum(memory.pages for memory in self._left.values())

    def open(self, keys: Sequence[PageKey]) -> StoredRow:
        row, shape = StoredRow(), self.shape
        empty = torch.empty(
            2, 1, shape.heads, 0, shape.head_dim, dtype=shape.dtype, device=shape.device
        )
        row.place = memory = _Memory([empty] * shape.layers)
        found: list[tuple[_Memory, int]] = []
        for key in keys:
            if key not in self._shared:
                break
            found.append(self._shared[key])
        sources = {id(source) for source, _ in found}
        for name in sources & self._left.keys():
            self._left.move_to_end(name)
        # What is copied must not be what makes the room for the copy.
        kept = sum(self._left[name].pages for name in sources & self._left.keys())
        if not found or self.available_pages - kept < len(found):
            return row
        self._resize(memory, len(found), 0)
        size = self.page_size
        for number, (source, page) in enumerate(found):
            for mine, theirs in zip(memory.layers, source.layers, strict=True):
                copied = theirs.narrow(3, page * size, size)
                mine.narrow(3, number * size, size).copy_(copied)
        row.length, row.pages = len(found) * size, memory.pages
        return row

    def grow(self, row: StoredRow, tokens: int) -> bool:
        memory, pages = _memory(row), self.pages_for(tokens)
        if pages <= memory.pages:
            return True
        if pages - memory.pages > self.available_pages:
            return False
        self._resize(memory, pages, row.length)
        row.pages = memory.pages
        return True

    def _resize(self, memory: _Memory, pages: int, length: int) -> None:
        """Give a row so many pages, of which the first `length` tokens are kept."""
        while self.num_pages - self._used < pages - memory.pages:
            self._forget(*self._left.popitem(last=False))
        self._used += pages - memory.pages
        memory.pages = pages
        for number, old in enumerate(memory.layers):
            new = old.new_empty(*old.shape[:3], pages * self.page_size, old.shape[4])
            new.narrow(3, 0, length).copy_(old.narrow(3, 0, length))
            memory.layers[number] = new

    def _forget(self, _: int, memory: _Memory) -> None:
        self._used -= memory.pages
        for key in memory.keys:
            if self._is_shared(memory, key):
                del self._shared[key]

    def _is_shared(self, memory: _Memory, key: PageKey) -> bool:
        """Whether others copy the page of this key from this memory, and not from a newer one."""
        found = self._shared.get(key)
        return found is not None and found[0] is memory

    def publish(self, row: StoredRow, keys: Sequence[PageKey]) -> None:
        memory = _memory(row)
        assert len(keys) * self.page_size <= row.length
        for page in range(len(memory.keys), len(keys)):
            # The newest copy stays the longest.
            self._shared[keys[page]] = memory, page
            memory.keys.append(keys[page])

    def close(self, row: StoredRow) -> None:
        memory = _memory(row)
        row.place = None
        if any(self._is_shared(memory, key) for key in memory.keys):
            self._left[id(memory)] = memory
        else:
            self._used -= memory.pages

    def plan(self, segments: Sequence[Segment]) -> None:
        self.num_keys = max(s.row.length + s.count for s in segments)
        self._counts = [s.count for s in segments]
        self._plan = []
        for segment in segments:
            mask, count = _mask(segment, self.shape.device), segment.count
            is_causal = mask is None and count > 1
            layers, past = _memory(segment.row).layers, segment.row.length
            self._plan.append((layers, past, count, mask, is_causal))

    def attend(self, q_NHW: Tensor, k_NHW: Tensor, v_NHW: Tensor, layer: int) -> Tensor:
        # One split for all rows: a row by itself costs five operations and no more. A single row
        # needs none; its step is short, and each call shows in it.
        new_21HNW = torch.stack((k_NHW, v_NHW)).transpose(1, 2).unsqueeze(1)
        q_1HNW = q_NHW.transpose(0, 1).unsqueeze(0)
        is_single = len(self._counts) == 1
        new = (new_21HNW,) if is_single else new_21HNW.split_with_sizes(self._counts, 3)
        queries = (q_1HNW,) if is_single else q_1HNW.split_with_sizes(self._counts, 2)
        gqa = q_NHW.shape[1] != k_NHW.shape[1]
        outputs = []
        for (layers, past, count, mask, is_causal), q_1HTW, new_21HTW in zip(
            self._plan, queries, new, strict=True
        ):
            memory = layers[layer]
            # A model may lie on several devices, or compute in another dtype than its weights'.
            if memory.device != k_NHW.device or memory.dtype != k_NHW.dtype:
                layers[layer] = memory = memory.to(k_NHW)
            memory.narrow(3, past, count).copy_(new_21HTW)
            keys, values = memory.narrow(3, 0, past + count).unbind()
            outputs.append(
                F.scaled_dot_product_attention(
                    q_1HTW, keys, values, mask, 0.0, is_causal, enable_gqa=gqa
                )
            )
        out_1HNW = outputs[0] if is_single else torch.cat(outputs, 2)
        return out_1HNW[0].transpose(0, 1)


def _memory(row: StoredRow) -> _Memory:
    assert isinstance(row.place, _Memory), "the row is closed"
    return row.place


def _mask(segment: Segment, device: torch.device) -> Tensor | None:
    """bool [T, L], causal; None where none is needed: one token, or a row's first ones."""
    if segment.count == 1 or segment.row.length == 0:
        return None
    total = segment.row.length + segment.count
    mask = torch.ones(segment.count, total, dtype=torch.bool, device=device)
    return mask.tril(diagonal=segment.row.length)
