"""Windows made ahead: they are the sampler's, errors reach whoever takes them, the thread ends."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from qwen_ds.data.ahead import WindowsAhead
from qwen_ds.data.batches import Part, StepSampler


class Rows:
    """Rows in memory; reading row `bad` fails."""

    pad_id = 0

    def __init__(self, count: int, bad: int = -1) -> None:
        self.lens = np.arange(3, 3 + count, dtype=np.int32)
        self.learnt = np.maximum(self.lens - 2, 0)
        self.parts, self._bad = [Part(count, 1.0)], bad

    def __len__(self) -> int:
        return len(self.lens)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        if row == self._bad:
            raise OSError(f"row {row} cannot be read")
        ids = np.arange(self.lens[row], dtype=np.int32)
        return ids, np.where(ids < 2, -100, ids).astype(np.int32)


def sampler(rank: int = 0, bad: int = -1) -> StepSampler:
    return StepSampler(Rows(10, bad), 4, 7, 2, rank, 20)


@pytest.mark.parametrize("first", [0, 4])
def test_windows_are_those_of_the_sampler(first: int) -> None:
    """Across epochs, and from any step on, as a resumed run asks for them."""
    plain = [sampler(rank) for rank in range(2)]
    with WindowsAhead(sampler(), 7, pinned=False) as windows:
        for step in range(first, 7):
            window = windows.take(step)
            position = divmod(step, plain[0].steps_per_epoch)
            wanted = plain[0].window(*position)
            for came, expected in zip(window.batches, wanted, strict=True):
                assert came.row_ids == expected.row_ids
                assert torch.equal(came.ids_BT, expected.ids_BT)
                assert torch.equal(came.labels_BT, expected.labels_BT)
            assert window.statistics == plain[0].statistics(*position)
            of_ranks = [batch for one in plain for batch in one.window(*position)]
            assert window.targets == sum(batch.num_targets for batch in of_ranks)


def test_an_error_reaches_whoever_takes_the_window() -> None:
    steps = sampler().steps_per_epoch
    bad = sampler().window(0, 1)[0].row_ids[0]  # a row that this rank reads
    with (
        WindowsAhead(sampler(bad=bad), steps, pinned=False) as windows,
        pytest.raises(OSError, match=f"row {bad}"),
    ):
        for step in range(steps):
            windows.take(step)


def test_the_next_window_is_made_meanwhile_and_the_worker_ends() -> None:
    with WindowsAhead(sampler(), 7, pinned=False) as windows:
        windows.take(0)
        assert windows._next is not None and windows._next[0] == 1
        windows._next[1].result(timeout=10)  # done before anyone asks for it
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
