"""Keys and values for GPUs: pages of one pool, which rows name in a table and share.

Attention reads the pages where they lie (qwen_ds/decode/paged_attention.py).

Shapes: N new tokens, B rows, P pages of a row, L entries of all tables, H heads, W head width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from qwen_ds.decode.kv import KVShape, KVStore, PageKey, Segment, StoredRow
from qwen_ds.decode.paged_attention import (
    PageParts,
    StepPages,
    attend_by_pages,
    attend_by_tables,
    attend_gathered,
    attend_pieces,
    choose_reading,
    parts_of,
)
from qwen_ds.decode.transfers import all_on_device, on_device


class PagedStore(KVStore):
    """A store whose rows are lists of pages. All of its memory is taken at once."""

    def __init__(self, shape: KVShape, num_pages: int, page_size: int = 16) -> None:
        super().__init__(shape, num_pages, page_size)
        size = (shape.layers, 2, num_pages, page_size, shape.heads, shape.head_dim)
        self._pool = torch.empty(size, dtype=shape.dtype, device=shape.device)
        self._free = list(range(num_pages))
        self._fresh: list[int] = []  # taken since the last step
        self._num_rows = [0] * num_pages  # that have a page
        self._page_of: dict[PageKey, int] = {}
        self._key_of: dict[int, PageKey] = {}
        self._left: OrderedDict[int, None] = OrderedDict()  # shared pages that no row has
        self.reading = choose_reading(shape, page_size)
        self.pages: StepPages
        self._parts: PageParts

    def reserve(self) -> int:
        """Take a page out of use, for good; its number. Only a new store can spare it."""
        self.num_pages -= 1
        page = self._free.pop()
        self._pool[:, :, page] = 0
        return page

    @property
    def available_pages(self) -> int:
        return len(self._free) + len(self._left)

    def open(self, keys: Sequence[PageKey]) -> StoredRow:
        row = StoredRow()
        row.place = table = []
        for key in keys:
            if (page := self._page_of.get(key)) is None:
                break
            self._left.pop(page, None)
            self._num_rows[page] += 1
            table.append(page)
        row.pages = len(table)
        row.length = row.pages * self.page_size
        return row

    def grow(self, row: StoredRow, tokens: int) -> bool:
        table = _table(row)
        more = self.pages_for(tokens) - len(table)
        if more > self.available_pages:
            return False
        for _ in range(more):
            if not self._free:
                page, _ = self._left.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
                self._free.append(page)
            page = self._free.pop()
            self._num_rows[page] = 1
            table.append(page)
            self._fresh.append(page)
        row.pages = len(table)
        return True

    def publish(self, row: StoredRow, keys: Sequence[PageKey]) -> None:
        assert len(keys) * self.page_size <= row.length
        for page, key in zip(_table(row), keys, strict=False):
            # Whoever came first is kept: others may have its page already.
            if key not in self._page_of and page not in self._key_of:
                self._page_of[key], self._key_of[page] = page, key

    def close(self, row: StoredRow) -> None:
        # Backwards: a page is of no use without those before it, so the last ones go first.
        for page in reversed(_table(row)):
            self._num_rows[page] -= 1
            if self._num_rows[page] == 0:
                if page in self._key_of:
                    self._left[page] = None
                else:
                    self._free.append(page)
        row.place = None

    def plan(self, segments: Sequence[Segment]) -> None:
        # What lies behind a row's last token gets the weight 0, and 0 times NaN is NaN: a row that
        # went wrong must not spoil the next one that gets its page. So tables are filled up with
        # pages of the row itself, too.
        device, size = self.shape.device, self.page_size
        if self._fresh:
            self._pool.index_fill_(2, on_device(self._fresh, torch.int64, device), 0)
            self._fresh = []
        lens = [s.row.length + s.count for s in segments]
        self.num_keys = max(lens)
        slots = [
            table[position // size] * size + position % size
            for segment, length in zip(segments, lens, strict=True)
            for table in [_table(segment.row)]
            for position in range(segment.row.length, length)
        ]
        most = self.pages_for(self.num_keys)
        table = [
            page for s in segments for page in (_table(s.row) + _table(s.row)[:1] * most)[:most]
        ]
        counts = [s.count for s in segments]
        starts = list(accumulate(counts, initial=0))
        table_L, lens_B, starts_B1 = all_on_device([table, lens, starts], torch.int32, device)
        self.pages = StepPages(
            on_device(slots, torch.int64, device), table_L.view(-1, most), lens_B, starts_B1,
            tuple(counts), tuple(lens),
        )  # fmt: skip

    def attend(self, q_NHW: Tensor, k_NHW: Tensor, v_NHW: Tensor, layer: int) -> Tensor:
        pool, pages = self._pool[layer], self.pages
        pool.flatten(1, 2)[:, pages.slots_N] = torch.stack((k_NHW, v_NHW)).to(pool)
        if self.reading == "tables":
            return attend_by_tables(q_NHW, pool, pages, self.num_keys)
        singles, outputs = pages.singles, []
        if singles and self.reading == "pages":
            if layer == 0:  # here, so that a graph of the forward makes them anew
                self._parts = parts_of(pages, self.page_size)
            outputs.append(attend_by_pages(q_NHW[:singles], pool, self._parts))
        elif singles:
            outputs.append(attend_gathered(q_NHW[:singles], pool, pages))
        if singles < len(pages.counts):
            outputs.append(attend_pieces(q_NHW, k_NHW, v_NHW, pool, pages))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _table(row: StoredRow) -> list[int]:
    assert isinstance(row.place, list), "the row is closed"
    return row.place
