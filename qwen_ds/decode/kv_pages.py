"""Keys and values for GPUs: pages of one pool, which rows name in a table and share.

Attention reads the pages where they lie, by FlashAttention's block tables, where this device and
torch have that; else it gathers them first.

Shapes: N new tokens, T those of one row, B rows of one token, P pages, S tokens of a page, L tokens
of a row's pages, H heads, W head width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import (
    activate_flash_attention_impl,
    list_flash_attention_impls,
    restore_flash_attention_impl,
)
from torch.nn.attention.varlen import varlen_attn

from qwen_ds.decode.kv import KVShape, KVStore, PageKey, Segment, StoredRow
from qwen_ds.decode.transfers import all_on_device, on_device
from qwen_ds.runlog import say

GATHERED_TOKENS = 16 * 1024
"""Keys and values that are copied at once where attention cannot read pages: of a 7B in bf16, 0.3
GB. All rows of a step together may be many times the store, since one long row makes all long."""


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
        self._reads_tables = reads_tables(shape, page_size)
        self.pages: StepPages

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
            tuple(counts),
        )  # fmt: skip

    def attend(self, q_NHW: Tensor, k_NHW: Tensor, v_NHW: Tensor, layer: int) -> Tensor:
        pool, pages = self._pool[layer], self.pages
        pool.flatten(1, 2)[:, pages.slots_N] = torch.stack((k_NHW, v_NHW)).to(pool)
        if not self._reads_tables:
            return self._attend_gathered(q_NHW, pool)
        keys, values = pool.unbind()
        out_NHW = varlen_attn(
            q_NHW, keys, values, pages.starts_B1, None, max(pages.counts), self.num_keys,
            window_size=(-1, 0), enable_gqa=q_NHW.shape[1] != self.shape.heads,
            seqused_k=pages.lens_B, block_table=pages.table_BP,
        )  # fmt: skip
        assert isinstance(out_NHW, Tensor)
        return out_NHW

    def _attend_gathered(self, q_NHW: Tensor, pool: Tensor) -> Tensor:
        pages, outputs = self.pages, []
        gqa = q_NHW.shape[1] != self.shape.heads
        index_L = torch.arange(pages.table_BP.shape[1] * self.page_size, device=q_NHW.device)
        start = single = pages.counts.count(1)
        at_once = max(1, GATHERED_TOKENS // len(index_L))
        for first in range(0, single, at_once):
            rows = slice(first, min(first + at_once, single))
            # [2, B, P, S, H, W] to [2, B, H, L, W]
            keys, values = pool[:, pages.table_BP[rows]].flatten(2, 3).transpose(2, 3).unbind()
            mask_B11L = (index_L < pages.lens_B[rows, None])[:, None, None]
            out_BH1W = F.scaled_dot_product_attention(
                q_NHW[rows].unsqueeze(2), keys, values, mask_B11L, enable_gqa=gqa
            )
            outputs.append(out_BH1W.squeeze(2))
        for i, count in enumerate(pages.counts[single:], single):
            keys, values = pool[:, pages.table_BP[i]].flatten(1, 2).transpose(1, 2).unbind()
            new_T1 = torch.arange(1 - count, 1, device=q_NHW.device)[:, None]
            q_HTW = q_NHW[start : start + count].transpose(0, 1)
            out_HTW = F.scaled_dot_product_attention(
                q_HTW[None], keys[None], values[None], index_L < pages.lens_B[i] + new_T1,
                enable_gqa=gqa,
            )[0]  # fmt: skip
            outputs.append(out_HTW.transpose(0, 1))
            start += count
        return torch.cat(outputs)


@dataclass(frozen=True, slots=True)
class StepPages:
    """Where the rows of a step lie; those of one new token come first."""

    slots_N: Tensor  # int64: the place of each new token in the pool, counted in tokens
    table_BP: Tensor  # int32: pages of each row
    lens_B: Tensor  # int32: tokens of each row, new ones included
    starts_B1: Tensor  # int32: places of the rows' first tokens among the N, and N
    counts: tuple[int, ...]  # new tokens of each row


def reads_tables(shape: KVShape, page_size: int) -> bool:
    """Whether this device's attention reads pages by a block table."""
    has_kernel = shape.device.type == "cuda" and shape.dtype in (torch.bfloat16, torch.float16)
    return has_kernel and kernel_runs(shape, page_size)


def kernel_runs(shape: KVShape, page_size: int) -> bool:
    """Whether FlashAttention takes a block table of such pages. It is tried: that depends on the
    card, on the version in torch, which may have none with tables, and on the packages that replace
    it if they are installed. A kernel that refuses is said; a wrong call of ours is an error."""
    reasons = []
    for name in (None, *list_flash_attention_impls()):
        try:
            if name is not None:
                activate_flash_attention_impl(name)
            if _reads_second_page(shape, page_size):
                return True
            reasons.append("the block table is ignored")
        except torch.OutOfMemoryError:  # which says nothing of the kernel
            raise
        # A card or a package that lacks it; torch has no kind of error for that alone.
        except (RuntimeError, ImportError) as error:
            reasons.append((str(error).splitlines() or [type(error).__name__])[0])
    restore_flash_attention_impl(_raise_warn=False)
    say(f"attention gathers pages before it reads them, which is slower: {reasons[0]}")
    return False


def _reads_second_page(shape: KVShape, page_size: int) -> bool:
    """Whether a token whose row is in the second of two pages gets the value that lies there."""
    make = partial(torch.tensor, dtype=torch.int32, device=shape.device)
    size = (2, page_size, shape.heads, shape.head_dim)
    pages = torch.zeros(size, dtype=shape.dtype, device=shape.device)
    pages[1] = 1
    out_NHW = varlen_attn(
        pages[0, :1], pages, pages, make([0, 1]), None, 1, 1, window_size=(-1, 0),
        enable_gqa=False, seqused_k=make([1]), block_table=make([[1]]),
    )  # fmt: skip
    assert isinstance(out_NHW, Tensor)
    return bool((out_NHW == 1).all())


def _table(row: StoredRow) -> list[int]:
    assert isinstance(row.place, list), "the row is closed"
    return row.place
