"""Which rank answers which rows: each takes a block of them when it has room for more.

The ranks share no more than the folder of parts. A block is taken by making a file of its number
there, which succeeds for one process alone, on network disks too. So a slow rank takes fewer, and
nobody hands out work. The file names the process: a block that a dead one left is taken anew. Two
may do that at the same instant; both then give the same answers, of which one is kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from qwen_ds.disk.lock import Holder

FOLDER = "taken"
MOST_ROWS = 64  # of a block: with more, the last ones would keep one rank busy
_BLOCKS_A_RANK = 16  # at least, where there are rows enough


def block_rows(rows: int, world: int) -> int:
    """Rows of a block, for so many rows and ranks."""
    return max(1, min(MOST_ROWS, rows // (world * _BLOCKS_A_RANK)))


RankProcess = Callable[[int], Holder | None]


@dataclass(frozen=True, slots=True)
class _Claim:
    rank: int
    holder: Holder


def process_that_came(folder: Path, rank: int) -> Holder | None:
    """The process of a rank that was the last to come for blocks in a folder of parts."""
    try:
        return Holder(**json.loads(_card(folder / FOLDER, rank).read_text())["holder"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _card(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}"


class Claims:
    """The blocks of one run, as one rank sees them.

    Args:
        folder: the folder of parts.
        own: this process, by its sign of life.
        rows: of the whole run; `size`: those of a block, the same for all ranks.
        alive: the process that is a rank now; None if there is none.
    """

    def __init__(
        self, folder: Path, rank: int, own: Holder, rows: int, size: int, alive: RankProcess
    ) -> None:
        self._folder, self.rows, self.size = folder / FOLDER, rows, size
        self._own, self._alive = _Claim(rank, own), alive
        self._taken: set[int] = set()
        self._folder.mkdir(exist_ok=True)
        self._text = json.dumps(asdict(self._own))
        if rank == 0:  # an earlier run's
            for card in self._folder.glob("rank_*"):
                card.unlink(missing_ok=True)
        self._card = _card(self._folder, rank)
        self._card.unlink(missing_ok=True)  # blocks that an earlier run took are links to it
        self._card.write_text(self._text, encoding="utf-8")

    def has_joined(self, rank: int) -> bool:
        """Whether a rank has come for blocks, as far as rank 0 knows: it may miss one that was
        there first."""
        return _card(self._folder, rank).exists()

    @property
    def num_blocks(self) -> int:
        return -(-self.rows // self.size)

    def block_of(self, row: int) -> int:
        return row // self.size

    def rows_of(self, block: int) -> range:
        return range(block * self.size, min((block + 1) * self.size, self.rows))

    def take(self, block: int) -> bool:
        """Take a block, unless a process that lives has it."""
        file = self._folder / f"{block:08d}"
        while True:
            try:
                self._make(file)
                self._taken.add(block)
                return True
            except FileExistsError:
                if self.is_held(block):
                    return False
                with suppress(FileNotFoundError):
                    file.unlink()

    def _make(self, file: Path) -> None:
        """Make a file that is whole from its first moment: others look at what it says."""
        try:
            os.link(self._card, file)
        except FileExistsError:
            raise
        except OSError:  # no hard links here, or no more of this one
            with file.open("x", encoding="utf-8") as stream:
                stream.write(self._text)

    def is_held(self, block: int) -> bool:
        """Whether a process that lives has a block; this one's own blocks are held."""
        if block in self._taken:
            return True
        claim = self._claim(block)
        if claim is None or claim.rank == self._own.rank:  # an earlier run's
            return False
        return self._alive(claim.rank) == claim.holder

    def rank_of(self, row: int) -> int | None:
        """The rank that has taken a row, dead or alive."""
        claim = self._claim(self.block_of(row))
        return None if claim is None else claim.rank

    def _claim(self, block: int) -> _Claim | None:
        try:
            found = json.loads((self._folder / f"{block:08d}").read_text(encoding="utf-8"))
            return _Claim(found["rank"], Holder(**found["holder"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None
