"""Parameters put together again from the pieces of several ranks, whatever cut them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen_ds import dist
from qwen_ds.train.engine.state import Part
from qwen_ds.train.survive.pieces import WholeFromPieces, write_pieces

A, B = torch.arange(10.0), torch.arange(100.0, 103.0)
PAD = torch.tensor([-1.0])

# Each rank's piece 0, and the parts in it: as ZeRO-2 cuts a list of parameters, and ZeRO-3 each.
CUTS = {
    "one after the other": [
        (A[:7], [Part("a", 0, 0, 0, 7)]),
        (torch.cat([A[7:], B, PAD]), [Part("a", 0, 0, 7, 3), Part("b", 0, 3, 0, 3)]),
    ],
    "each, with padding": [
        (torch.cat([A[:5], B[:2]]), [Part("a", 0, 0, 0, 5), Part("b", 0, 5, 0, 2)]),
        (torch.cat([A[5:], B[2:], PAD]), [Part("a", 0, 0, 5, 5), Part("b", 0, 5, 2, 1)]),
    ],
    "nothing of b on the second": [
        (torch.cat([A[:9], B]), [Part("a", 0, 0, 0, 9), Part("b", 0, 9, 0, 3)]),
        (torch.cat([A[9:], PAD]), [Part("a", 0, 0, 9, 1), Part("b", 0, 1, 3, 0)]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
def test_any_cut_gives_the_whole_parameters_back(
    cut: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    for rank, (piece, parts) in enumerate(CUTS[cut]):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        written = write_pieces(tmp_path, {"value.0": piece, "exp_avg.0": piece + 0.5}, parts)
        assert list(written) == [f"shard_{rank:05d}_of_00002.safetensors"]
    with WholeFromPieces(tmp_path, 2) as pieces:
        for name, whole in (("a", A), ("b", B)):
            assert torch.equal(pieces.read(name, "value"), whole)
            assert torch.equal(pieces.read(name, "exp_avg"), whole + 0.5)
