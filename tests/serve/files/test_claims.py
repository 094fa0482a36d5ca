"""Blocks of rows: one rank has each, and a dead one's are taken anew."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwen_ds.disk.lock import Holder
from serve.files.claims import MOST_ROWS, Claims, block_rows


class Ranks:
    """The ranks of a run, each with its process."""

    def __init__(self, folder: Path, rows: int = 10, size: int = 3) -> None:
        self.folder, self.rows, self.size = folder, rows, size
        self.alive: dict[int, Holder] = {}

    def start(self, rank: int, pid: int) -> Claims:
        self.alive[rank] = own = Holder("here", pid, "now")
        return Claims(self.folder, rank, own, self.rows, self.size, self.alive.get)


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    return Ranks(tmp_path)


def test_blocks_cover_every_row_once(ranks: Ranks) -> None:
    claims = ranks.start(0, 1)
    rows = [row for block in range(claims.num_blocks) for row in claims.rows_of(block)]
    assert rows == list(range(10))
    assert all(row in claims.rows_of(claims.block_of(row)) for row in rows)


@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize("rows", [1, 7, 100, 1_000_000])
def test_blocks_are_small_enough_for_the_last_ones_to_be_shared(rows: int, world: int) -> None:
    size = block_rows(rows, world)
    assert 1 <= size <= MOST_ROWS
    assert size == 1 or rows / size >= 16 * world


def test_a_block_is_one_ranks(ranks: Ranks) -> None:
    zero, one = ranks.start(0, 1), ranks.start(1, 2)
    assert zero.take(0) and not one.take(0) and one.take(1) and not zero.take(1)
    assert zero.is_held(1) and one.is_held(0) and not zero.is_held(2)
    assert [zero.rank_of(row) for row in (0, 2, 3, 6)] == [0, 0, 1, None]


def test_many_that_ask_at_once_get_different_blocks(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, rows=60, size=1)
    claims = [ranks.start(rank, rank + 1) for rank in range(6)]

    def taken(one: Claims) -> list[int]:
        return [block for block in range(60) if one.take(block)]

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(taken, claims))
    assert sorted(block for blocks in found for block in blocks) == list(range(60))


def test_what_an_earlier_run_held_is_free(ranks: Ranks) -> None:
    old = [ranks.start(rank, rank + 1) for rank in range(3)]
    for block, claims in enumerate(old):
        assert claims.take(block)
    ranks.alive.clear()
    # Fewer ranks than before; one has not come yet, one even has the number of its old process.
    zero = ranks.start(0, 1)
    assert [zero.take(block) for block in range(3)] == [True, True, True]
    one = ranks.start(1, 9)
    assert not any(one.take(block) for block in range(3))


def test_a_claim_cut_off_by_a_kill_is_free(ranks: Ranks) -> None:
    zero = ranks.start(0, 1)
    (ranks.folder / "taken" / "00000002").write_text('{"rank": 1, "hol')
    assert not zero.is_held(2) and zero.take(2) and zero.is_held(2)
