"""Full training's state on disk: a file of each rank, with the flat pieces that ZeRO gives it.

Each file says which part of which parameter lies where in its pieces, so that any number of ranks
under any stage can put the parameters together again. The same ranks under the same stage read
their own pieces back instead.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qwen_ds import dist
from qwen_ds.disk.weights import save_tensors
from qwen_ds.train.engine.state import Part

_PARTS = "parts"


def shard_name(rank: int, world: int) -> str:
    return f"shard_{rank:05d}_of_{world:05d}.safetensors"


def write_pieces(folder: Path, pieces: Mapping[str, Tensor], parts: list[Part]) -> dict[str, str]:
    """Write this rank's file; returns its name and sha256."""
    name = shard_name(dist.rank(), dist.world_size())
    return {name: save_tensors(folder / name, pieces, {_PARTS: json.dumps(parts)})}


class WholeFromPieces:
    """Complete values and moments, read from the files of all ranks that wrote them."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self._held = ExitStack()
        self._files: list[Any] = []  # safetensors' handles have no type
        self._parts: defaultdict[str, list[tuple[int, Part]]] = defaultdict(list)
        for rank in range(ranks):
            file = safe_open(folder / shard_name(rank, ranks), framework="pt")
            self._files.append(self._held.enter_context(file))
            for name, *numbers in json.loads(self._files[-1].metadata()[_PARTS]):
                self._parts[name].append((rank, Part(name, *numbers)))

    def __enter__(self) -> WholeFromPieces:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def read(self, name: str, kind: str) -> Tensor:
        """All elements of a parameter's value or moment, flat."""
        whole = torch.full((sum(part.elements for _, part in self._parts[name]),), torch.nan)
        for rank, part in self._parts[name]:
            piece = self._files[rank].get_slice(f"{kind}.{part.piece}")
            here = piece[part.offset : part.offset + part.elements]
            whole[part.start : part.start + part.elements] = here
        return whole
