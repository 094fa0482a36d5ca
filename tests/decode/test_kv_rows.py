"""Attention of packed rows, by either store, against plain attention of each row alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qwen_ds.decode import kv_pages, paged_attention
from qwen_ds.decode.kv import KVShape, KVStore, Segment
from qwen_ds.decode.kv_pages import PagedStore
from qwen_ds.decode.kv_rows import ContiguousStore

LAYERS, WIDTH = 2, 8


def plain(q_THW: Tensor, keys_LHW: Tensor, values_LHW: Tensor) -> Tensor:
    """Causal attention of the last T tokens of a row of L: [T, H, W]."""
    groups = q_THW.shape[1] // keys_LHW.shape[1]
    keys = keys_LHW.repeat_interleave(groups, 1).transpose(0, 1)
    values = values_LHW.repeat_interleave(groups, 1).transpose(0, 1)
    scores = q_THW.transpose(0, 1) @ keys.transpose(1, 2) / WIDTH**0.5
    total, new = keys.shape[1], q_THW.shape[0]
    hidden = torch.ones(new, total, dtype=torch.bool).triu(diagonal=total - new + 1)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1)


def check(kv: KVStore, q_heads: int, heads: int, seed: int) -> None:
    """Run rows through steps of single tokens and pieces, and compare each."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    lens = [rng.randrange(1, 40) for _ in range(5)]
    rows = [kv.open([]) for _ in lens]
    keys = [draw(LAYERS, n, heads, WIDTH) for n in lens]
    values = [draw(LAYERS, n, heads, WIDTH) for n in lens]
    while any(row.length < n for row, n in zip(rows, lens, strict=True)):
        counts = [
            min(rng.choice([0, 1, 1, 3, 9]), n - row.length)
            for row, n in zip(rows, lens, strict=True)
        ]
        order = sorted((i for i in range(5) if counts[i]), key=lambda i: counts[i] > 1)
        if not order:
            continue
        segments, start = [], 0
        for i in order:
            assert kv.grow(rows[i], rows[i].length + counts[i])
            segments.append(Segment(rows[i], start, counts[i]))
            start += counts[i]
        kv.plan(segments)
        assert kv.num_keys == max(rows[i].length + counts[i] for i in order)
        for layer in range(LAYERS):
            q_NHW = draw(start, q_heads, WIDTH)
            spans = [(i, rows[i].length, rows[i].length + counts[i]) for i in order]
            out_NHW = kv.attend(
                q_NHW,
                torch.cat([keys[i][layer, begin:end] for i, begin, end in spans]),
                torch.cat([values[i][layer, begin:end] for i, begin, end in spans]),
                layer,
            )
            for segment, (i, _, end) in zip(segments, spans, strict=True):
                part = slice(segment.start, segment.start + segment.count)
                expected = plain(q_NHW[part], keys[i][layer, :end], values[i][layer, :end])
                torch.testing.assert_close(out_NHW[part], expected)
        for i in order:
            rows[i].length += counts[i]


def shape(heads: int) -> KVShape:
    return KVShape(LAYERS, heads, WIDTH, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("q_heads, heads", [(2, 2), (4, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("store", [ContiguousStore, PagedStore])
def test_each_token_attends_to_its_row_up_to_itself(
    store: Any, seed: int, q_heads: int, heads: int
) -> None:
    check(store(shape(heads), 60, 4), q_heads, heads, seed)


def varlen_by_hand(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: None, max_q: int,
    max_k: int, *, window_size: Sequence[int], enable_gqa: bool, seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:  # fmt: skip
    """FlashAttention with a block table, as torch's documentation describes it."""
    assert tuple(window_size) == (-1, 0) and block_table.dtype == cu_seq_q.dtype == torch.int32
    assert enable_gqa == (query.shape[1] != key.shape[2])
    outputs, starts = [], cu_seq_q.tolist()
    assert max_q == max(b - a for a, b in zip(starts, starts[1:], strict=False))
    assert max_k == int(seqused_k.max())
    for i, used in enumerate(seqused_k.tolist()):
        keys = key[block_table[i].long()].flatten(0, 1)[:used]
        values = value[block_table[i].long()].flatten(0, 1)[:used]
        outputs.append(plain(query[starts[i] : starts[i + 1]], keys, values))
    return torch.cat(outputs)


@pytest.mark.parametrize("q_heads, heads", [(2, 2), (4, 2)], ids=["mha", "gqa"])
def test_block_tables_say_where_a_row_lies(
    monkeypatch: pytest.MonkeyPatch, q_heads: int, heads: int
) -> None:
    """The path of GPUs, with the kernel spelled out."""
    monkeypatch.setattr(paged_attention, "varlen_attn", varlen_by_hand)
    monkeypatch.setattr(kv_pages, "choose_reading", lambda *_: "tables")
    check(PagedStore(shape(heads), 60, 4), q_heads, heads, seed=9)


@pytest.mark.parametrize("q_heads, heads", [(2, 2), (4, 2)], ids=["mha", "gqa"])
def test_no_more_keys_are_gathered_at_once_than_the_bound(
    monkeypatch: pytest.MonkeyPatch, q_heads: int, heads: int
) -> None:
    gathered = []

    class Spying(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is F.scaled_dot_product_attention:
                gathered.append((args[1].shape[0], args[1].shape[2]))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(paged_attention, "GATHERED_TOKENS", 24)
    for seed in range(8):
        with Spying():
            check(PagedStore(shape(heads), 60, 4), q_heads, heads, seed)
    assert max(rows for rows, _ in gathered) > 1
    # One row may be longer.
    assert all(rows * tokens <= 24 for rows, tokens in gathered if rows > 1)


def no_tables(*_: object, **__: object) -> None:
    raise RuntimeError("no tables")


def flash_by_hand(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int,
    max_k: int, dropout: float, is_causal: bool, debugs: bool, *, seqused_k: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """FlashAttention of torch: no block tables; of single queries over sequences that may begin
    anywhere, with the logarithms of their sums [H, M]; +inf, and zeros, for an empty one."""
    assert (dropout, is_causal, debugs) == (0.0, False, False)
    count, heads, width = query.shape
    assert len(cu_seq_k) == len(cu_seq_q) == len(seqused_k) + 1 == count + 1 and max_q == 1
    assert {x.dtype for x in (cu_seq_q, cu_seq_k, seqused_k)} == {torch.int32}
    place_K = torch.arange(max_k)
    index_MK = (cu_seq_k[:-1, None] + place_K).clamp(max=len(key) - 1)
    keys, values = (x.repeat_interleave(heads // x.shape[1], 1)[index_MK] for x in (key, value))
    scores_MHK = torch.einsum("mhw,mkhw->mhk", query, keys) / width**0.5
    scores_MHK = scores_MHK.masked_fill((place_K >= seqused_k[:, None])[:, None], -torch.inf)
    is_empty_M = seqused_k == 0
    out_MHW = torch.einsum("mhk,mkhw->mhw", scores_MHK.softmax(-1), values)
    out_MHW = out_MHW.masked_fill(is_empty_M[:, None, None], 0)
    return out_MHW, scores_MHK.logsumexp(-1).T.masked_fill(is_empty_M, torch.inf)


@pytest.mark.parametrize("q_heads, heads", [(2, 2), (4, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("seed", range(3))
def test_pages_that_are_read_one_by_one_give_the_rows_attention(
    monkeypatch: pytest.MonkeyPatch, seed: int, q_heads: int, heads: int
) -> None:
    """The path of GPUs where torch's own kernel is all there is."""
    monkeypatch.setattr(paged_attention, "flash_forward", flash_by_hand)
    monkeypatch.setattr(kv_pages, "choose_reading", lambda *_: "pages")
    check(PagedStore(shape(heads), 60, 4), q_heads, heads, seed)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every kernel is tried anew, on the CPU."""
    tried = (paged_attention.refuses_tables, paged_attention.refuses_pages)
    for one in tried:
        one.cache_clear()
    monkeypatch.setattr(paged_attention, "_has_flash", lambda _: True)
    yield
    for one in tried:
        one.cache_clear()


@pytest.mark.usefixtures("on_gpu")
def test_a_kernel_of_an_installed_package_is_taken_where_torch_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    active: list[str | None] = [None]

    def activate(name: str) -> None:
        if name == "missing":
            raise ModuleNotFoundError("no such package")
        active[0] = name

    def attention(*args: Any, **options: Any) -> Tensor:
        if active[0] is None:
            raise RuntimeError("no tables")
        if active[0] == "ignores tables":
            return args[2][0, :1]
        return varlen_by_hand(*args, **options)

    def restore(_raise_warn: bool) -> None:
        active[0] = None

    monkeypatch.setattr(paged_attention, "varlen_attn", attention)
    monkeypatch.setattr(paged_attention, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(paged_attention, "restore_flash_attention_impl", restore)
    names = ["missing", "ignores tables", "good"]
    monkeypatch.setattr(paged_attention, "list_flash_attention_impls", lambda: names)
    assert paged_attention.refuses_tables(shape(2), 4) is None
    assert active == ["good"]
    restore(False)
    names.pop()
    assert paged_attention.refuses_tables(shape(2), 8) == "no tables"
    assert active == [None]


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    ("tables", "pages", "reading", "said"),
    [
        (varlen_by_hand, flash_by_hand, "tables", ""),
        (no_tables, flash_by_hand, "pages", "slower than by block tables: no tables\n"),
        (
            no_tables,
            lambda *args, **more: (flash_by_hand(*args, **more)[0], torch.zeros(2, 3)),
            "gathered",
            "slower: no tables; a page's result is another one\n",
        ),
    ],
)
def test_a_slower_way_to_read_pages_is_said(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tables: Any,
    pages: Any,
    reading: str,
    said: str,
) -> None:
    monkeypatch.setattr(paged_attention, "varlen_attn", tables)
    monkeypatch.setattr(paged_attention, "flash_forward", pages)
    monkeypatch.setattr(paged_attention, "list_flash_attention_impls", list)
    kv = PagedStore(shape(2), 60, 4)
    assert kv.reading == reading
    assert capsys.readouterr().out.endswith(said)
    wide = paged_attention.WIDE_PAGE_TOKENS
    assert paged_attention.page_tokens(shape(2)) == (32 if reading == "tables" else wide)


def test_cpus_have_no_kernel_of_pages() -> None:
    assert paged_attention.choose_reading(shape(2), 4) == "gathered"
    assert paged_attention.page_tokens(shape(2)) == 32


@pytest.mark.usefixtures("on_gpu")
def test_a_torch_without_block_tables_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention, "_HAS_TABLES", False)
    assert paged_attention.refuses_tables(shape(2), 4) == f"torch {torch.__version__} has none"


@pytest.mark.usefixtures("on_gpu")
def test_a_kernel_that_refuses_tables_says_why_and_a_wrong_call_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raising(error: Exception) -> Any:
        def attention(*_: object, **__: object) -> None:
            raise error

        return attention

    refuses = (paged_attention.refuses_tables, paged_attention.refuses_pages)
    for refusal in refuses:
        for error in (RuntimeError("page size 16\nand more"), NotImplementedError("page size 16")):
            for kernel in ("varlen_attn", "flash_forward"):
                monkeypatch.setattr(paged_attention, kernel, raising(error))
            assert refusal(shape(2), 4) == "page size 16"
            refusal.cache_clear()
        for error in (TypeError("unexpected argument"), torch.OutOfMemoryError("no room")):
            for kernel in ("varlen_attn", "flash_forward"):
                monkeypatch.setattr(paged_attention, kernel, raising(error))
            with pytest.raises(type(error)):
                refusal(shape(2), 4)


def test_a_store_of_rows_follows_the_models_dtype() -> None:
    kv = ContiguousStore(shape(2), 4, 4)
    row = kv.open([])
    assert kv.grow(row, 3)
    kv.plan([Segment(row, 0, 3)])
    q = torch.randn(3, 2, WIDTH, dtype=torch.bfloat16)
    out = kv.attend(q, q, q, 0)
    expected = F.scaled_dot_product_attention(*[q.transpose(0, 1)] * 3, is_causal=True)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected.transpose(0, 1), rtol=0.02, atol=0.02)
