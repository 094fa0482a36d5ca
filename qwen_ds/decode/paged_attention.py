"""Attention over the pages of a store, read where they lie.

FlashAttention 3 and 4 read pages by block tables. The one in torch has none: it reads each page as
a sequence of its own, and the pages' results are put together by their sums of exponentials, as
Flash-Decoding has it (Dao and others, 2023). Where neither runs, in float32 for example, pages are
copied side by side first.

Shapes: N new tokens, T those of one row, B rows of one token, P pages of a row, M = B * P of all
rows, S tokens of a page, L tokens of a row, H heads, W head width. A layer's pool is [2, pages, S,
H, W].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from qwen_ds.decode.kv import KVShape
from qwen_ds.runlog import say

try:
    from torch.nn.attention import (
        activate_flash_attention_impl,
        list_flash_attention_impls,
        restore_flash_attention_impl,
    )
    from torch.nn.attention.varlen import varlen_attn

    _HAS_TABLES = "block_table" in signature(varlen_attn).parameters
except ImportError:  # an older torch
    _HAS_TABLES = False
flash_forward = torch.ops.aten._flash_attention_forward

Reading = Literal["tables", "pages", "gathered"]

GATHERED_TOKENS = 16 * 1024
"""Keys and values that are copied at once where attention cannot read pages: of a 7B in bf16, 0.3
GB. All rows of a step together may be many times the store, since one long row makes all long."""
PAGE_TOKENS = 32
WIDE_PAGE_TOKENS = 256
"""Of pages that are sequences of their own to a kernel: its work is cut into so many pieces."""


@dataclass(frozen=True, slots=True)
class StepPages:
    """Where the rows of a step lie."""

    slots_N: Tensor  # int64: the place of each new token in the pool, counted in tokens
    table_BP: Tensor  # int32: pages of each row
    lens_B: Tensor  # int32: tokens of each row, new ones included
    starts_B1: Tensor  # int32: places of the rows' first tokens among the N, and N
    counts: tuple[int, ...]  # new tokens of each row
    lens: tuple[int, ...]  # as lens_B; not those of a graph's replay

    @property
    def singles(self) -> int:
        """Rows of one new token, which come first."""
        return self.counts.count(1)


def attend_by_tables(q_NHW: Tensor, pool: Tensor, pages: StepPages, num_keys: int) -> Tensor:
    """Attention of all new tokens, by a kernel with block tables."""
    keys, values = pool.unbind()
    out_NHW = varlen_attn(
        q_NHW, keys, values, pages.starts_B1, None, max(pages.counts), num_keys,
        window_size=(-1, 0), enable_gqa=q_NHW.shape[1] != keys.shape[2],
        seqused_k=pages.lens_B, block_table=pages.table_BP,
    )  # fmt: skip
    assert isinstance(out_NHW, Tensor)
    return out_NHW


@dataclass(frozen=True, slots=True)
class PageParts:
    """The pages of rows with one new token, as sequences of their own, of which some are empty."""

    starts_M1: Tensor  # int32: the first token of each in the pool; the last number is not used
    used_M: Tensor  # int32: its tokens
    queries_M1: Tensor  # int32: 0, 1 ... M
    rows: int


def parts_of(pages: StepPages, page_size: int) -> PageParts:
    """The parts of a step, by operations that a graph can repeat."""
    rows, device = pages.singles, pages.lens_B.device
    table_BP = pages.table_BP[:rows]
    firsts_P = torch.arange(table_BP.shape[1], dtype=torch.int32, device=device) * page_size
    used_BP = (pages.lens_B[:rows, None] - firsts_P).clamp(0, page_size)
    starts_M1 = F.pad((table_BP * page_size).flatten(), (0, 1))
    queries_M1 = torch.arange(len(starts_M1), dtype=torch.int32, device=device)
    return PageParts(starts_M1, used_BP.flatten(), queries_M1, rows)


def attend_by_pages(q_BHW: Tensor, pool: Tensor, parts: PageParts) -> Tensor:
    """Attention of rows with one new token, by a kernel without block tables."""
    page_size = pool.shape[2]
    keys, values = pool.flatten(1, 2).unbind()
    num_pages = len(parts.used_M) // parts.rows
    q_MHW = q_BHW.repeat_interleave(num_pages, 0)
    # Not `varlen_attn`, which has `seqused_k` in the latest versions of torch only.
    out_MHW, log_sum_HM, *_ = flash_forward(
        q_MHW, keys, values, parts.queries_M1, parts.starts_M1, 1, page_size, 0.0, False, False,
        seqused_k=parts.used_M,
    )  # fmt: skip
    if num_pages == 1:
        return out_MHW
    # Of a page without tokens the kernel says +inf.
    log_sum_HM = log_sum_HM.float().masked_fill(parts.used_M == 0, -torch.inf)
    share_HBP = log_sum_HM.unflatten(1, (parts.rows, num_pages)).softmax(-1)
    share_BPH1 = share_HBP.permute(1, 2, 0).unsqueeze(-1)
    out_BPHW = out_MHW.unflatten(0, (parts.rows, num_pages))
    return (out_BPHW * share_BPH1).sum(1).to(q_BHW.dtype)


def attend_gathered(q_BHW: Tensor, pool: Tensor, pages: StepPages) -> Tensor:
    """Attention of rows with one new token, whose pages are copied side by side first."""
    outputs, gqa = [], q_BHW.shape[1] != pool.shape[3]
    index_L = torch.arange(pages.table_BP.shape[1] * pool.shape[2], device=q_BHW.device)
    at_once = max(1, GATHERED_TOKENS // len(index_L))
    for first in range(0, len(q_BHW), at_once):
        rows = slice(first, min(first + at_once, len(q_BHW)))
        # [2, B, P, S, H, W] to [2, B, H, L, W]
        keys, values = pool[:, pages.table_BP[rows]].flatten(2, 3).transpose(2, 3).unbind()
        mask_B11L = (index_L < pages.lens_B[rows, None])[:, None, None]
        out_BH1W = F.scaled_dot_product_attention(
            q_BHW[rows].unsqueeze(2), keys, values, mask_B11L, enable_gqa=gqa
        )
        outputs.append(out_BH1W.squeeze(2))
    return torch.cat(outputs)


def attend_pieces(
    q_NHW: Tensor, k_NHW: Tensor, v_NHW: Tensor, pool: Tensor, pages: StepPages
) -> Tensor:
    """Attention of pieces of prompts, row by row and without masks: a first piece needs no page, a
    later one has its row's copied once."""
    outputs, gqa = [], q_NHW.shape[1] != k_NHW.shape[1]
    start = singles = pages.singles
    for i, count in enumerate(pages.counts[singles:], singles):
        new, length = slice(start, start + count), pages.lens[i]
        start += count
        keys, values = k_NHW[new], v_NHW[new]
        if length > count:
            keys, values = pool[:, pages.table_BP[i]].flatten(1, 2)[:, :length]
        q_1HTW, k_1HLW, v_1HLW = (x.transpose(0, 1)[None] for x in (q_NHW[new], keys, values))
        out_1HTW = F.scaled_dot_product_attention(
            q_1HTW, k_1HLW, v_1HLW, causal_lower_right(count, length), enable_gqa=gqa
        )
        outputs.append(out_1HTW[0].transpose(0, 1))
    return torch.cat(outputs)


def page_tokens(shape: KVShape) -> int:
    """Tokens of a page that suit the way in which this device reads them."""
    is_wide = _has_flash(shape) and refuses_tables(shape, PAGE_TOKENS)
    return WIDE_PAGE_TOKENS if is_wide else PAGE_TOKENS


def choose_reading(shape: KVShape, page_size: int) -> Reading:
    """The way in which attention reads pages on this device; a slower one is said."""
    if not _has_flash(shape):
        return "gathered"
    if (reason := refuses_tables(shape, page_size)) is None:
        return "tables"
    if (other := refuses_pages(shape, page_size)) is None:
        say(f"attention reads pages one by one, which is slower than by block tables: {reason}")
        return "pages"
    say(f"attention gathers pages before it reads them, which is slower: {reason}; {other}")
    return "gathered"


def _has_flash(shape: KVShape) -> bool:
    return shape.device.type == "cuda" and shape.dtype in (torch.bfloat16, torch.float16)


@cache
def refuses_tables(shape: KVShape, page_size: int) -> str | None:
    """Why FlashAttention takes no block table of such pages, if it takes none. It is tried: that
    depends on the card, on the version in torch, which may have none with tables, and on the
    packages that replace it if they are installed. A wrong call of ours is an error."""
    if not _HAS_TABLES:
        return f"torch {torch.__version__} has none"
    reasons = []
    for name in (None, *list_flash_attention_impls()):
        try:
            if name is not None:
                activate_flash_attention_impl(name)
            if _reads_second_page(shape, page_size):
                return None
            reasons.append("the block table is ignored")
        except torch.OutOfMemoryError:  # which says nothing of the kernel
            raise
        # A card or a package that lacks it; torch has no kind of error for that alone.
        except (RuntimeError, ImportError) as error:
            reasons.append((str(error).splitlines() or [type(error).__name__])[0])
    restore_flash_attention_impl(_raise_warn=False)
    return reasons[0]


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


@cache
def refuses_pages(shape: KVShape, page_size: int) -> str | None:
    """Why the kernel in torch cannot read pages one by one, if it cannot."""
    try:
        return None if _reads_each_page(shape, page_size) else "a page's result is another one"
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return (str(error).splitlines() or [type(error).__name__])[0]


def _reads_each_page(shape: KVShape, page_size: int) -> bool:
    """Whether a row of two pages, the last one not full, beside an empty one gets the result that
    its keys and values give side by side."""
    size, device = (2, 4, page_size, shape.heads, shape.head_dim), shape.device

    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, shape.dtype)

    pool, q_1HW = draw(*size), 2 * draw(1, shape.heads, shape.head_dim)
    make = partial(torch.tensor, dtype=torch.int32, device=device)
    length = page_size + page_size // 2 + 1
    pages = StepPages(make([0]), make([[3, 1, 1]]), make([length]), make([0, 1]), (1,), (length,))
    found_1HW = attend_by_pages(q_1HW, pool, parts_of(pages, page_size))
    keys, values = pool[:, [3, 1]].flatten(1, 2)[:, :length].transpose(1, 2).float()
    expected_H1W = F.scaled_dot_product_attention(q_1HW[0, :, None].float(), keys, values)
    # NaN is below nothing.
    return bool((found_1HW[0] - expected_H1W[:, 0]).abs().max() < 0.02)
