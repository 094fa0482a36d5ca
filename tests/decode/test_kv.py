"""Pages and their keys, and what every store promises, whatever its layout."""

from __future__ import annotations

import random

import pytest
import torch

from qwen_ds.decode.kv import KVShape, KVStore, StoredRow, page_keys, pages_in
from qwen_ds.decode.kv_pages import PagedStore
from qwen_ds.decode.kv_rows import ContiguousStore

SHAPE = KVShape(2, 2, 4, torch.float32, torch.device("cpu"))
STORES = [ContiguousStore, PagedStore]


def test_a_key_follows_from_all_that_comes_before_and_from_adapter_and_alpha() -> None:
    tokens = list(range(20))
    keys = page_keys(tokens, 4, None, 1)
    assert len(keys) == len(set(keys)) == 5
    assert page_keys(tokens[:19], 4, None, 1) == keys[:4]
    changed = page_keys([*tokens[:5], 99, *tokens[6:]], 4, None, 1)
    assert changed[0] == keys[0] and not set(changed[1:]) & set(keys)
    for other in (page_keys(tokens, 4, "a", 1), page_keys(tokens, 4, None, 3)):
        assert not set(other) & set(keys)
    # A page is the same wherever its beginning is, not its tokens alone.
    assert page_keys([1, 2, 3, 4] * 2, 4, None, 1)[0] != page_keys([1, 2, 3, 4] * 2, 4, None, 1)[1]


def test_a_memory_budget_is_counted_in_whole_pages() -> None:
    assert SHAPE.bytes_per_token == 2 * 2 * 2 * 4 * 4
    page = 16 * SHAPE.bytes_per_token
    assert [pages_in(n, SHAPE, 16) for n in (page - 1, page, 3.9 * page)] == [0, 1, 3]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("seed", range(20))
def test_pages_are_never_lost_nor_given_twice(store: type[KVStore], seed: int) -> None:
    """Random rows that come, grow, share and go: what is not available is what rows have."""
    rng = random.Random(seed)
    kv = store(SHAPE, 24, 4)
    rows: list[tuple[StoredRow, list[int]]] = []
    for _ in range(200):
        if rng.random() < 0.4:
            tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 30))]
            row = kv.open(page_keys(tokens, 4, None, 1)[: (len(tokens) - 1) // 4])
            assert row.length % 4 == 0 and row.length < len(tokens)
            if not kv.grow(row, len(tokens)):
                kv.close(row)
                continue
            row.length = len(tokens)
            kv.publish(row, page_keys(tokens, 4, None, 1))
            rows.append((row, tokens))
        elif rows:
            row, _ = rows.pop(rng.randrange(len(rows)))
            kv.close(row)
        assert 0 <= kv.available_pages <= 24
        assert 24 - kv.available_pages <= sum(kv.pages_for(row.length) for row, _ in rows)
        if store is ContiguousStore:  # whose rows share by copying
            assert 24 - kv.available_pages == sum(row.pages for row, _ in rows)
    for row, _ in rows:
        kv.close(row)
    assert kv.available_pages == 24


@pytest.mark.parametrize("store", STORES)
def test_the_longest_unused_prefixes_make_room_first(store: type[KVStore]) -> None:
    kv = store(SHAPE, 6, 4)
    keys = [page_keys([i] * 8, 4, None, 1) for i in range(4)]

    def hits(i: int) -> int:
        row = kv.open(keys[i])
        length = row.length
        kv.close(row)
        return length

    for i in range(3):
        row = kv.open([])
        assert kv.grow(row, 8)
        row.length = 8
        kv.publish(row, keys[i])
        kv.close(row)
    assert kv.available_pages == 6
    if store is PagedStore:  # a row of copies would take room of its own
        assert [hits(i) for i in (1, 2, 0)] == [8, 8, 8]
        row = kv.open([])
        assert kv.grow(row, 8)  # takes what was used longest ago: the pages of 1
        assert [hits(0), hits(2), hits(1)] == [8, 8, 0]
    else:
        row = kv.open([])
        assert kv.grow(row, 8)  # takes the first
        assert hits(0) == 0
        assert hits(2) == 8
    assert not kv.grow(row, 25)
    assert row.pages == 2
