"""Stored weights as a stream of row blocks, every byte of their files hashed on the way."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from qwen_ds.disk.shards import StoredWeights
from qwen_ds.disk.weights import Header
from qwen_ds.errors import UserError
from qwen_ds.export.stream.blocks import BLOCKS_IN_FLIGHT, RowRange

_HASH_BYTES = 2**20  # read at once where only the checksum is wanted


class _File:
    """An opened weight file.

    Hashed reads should go forwards: bytes that they pass over are read just for the checksum.
    """

    def __init__(self, header: Header) -> None:
        self._header = header
        self._file = header.path.open("rb", buffering=0)
        self._sha256 = hashlib.sha256()
        self._hashed = 0  # bytes from the start that the checksum has seen
        self._starts = header.starts
        self._num_bytes = header.path.stat().st_size

    def _pread(self, num_bytes: int, offset: int) -> Tensor:
        # Unlike a bytearray, not filled with zeros first.
        block = torch.empty(num_bytes, dtype=torch.uint8)
        view = block.numpy().data
        while view:
            count = os.preadv(self._file.fileno(), [view], offset)
            if not count:
                raise UserError(
                    f"{self._header.path}: ended while it was read; expected it to stay as it is"
                )
            view, offset = view[count:], offset + count
        return block

    def _hash_to(self, end: int) -> None:
        while self._hashed < end:
            block = self._pread(min(_HASH_BYTES, end - self._hashed), self._hashed)
            self._sha256.update(block.numpy().data)
            self._hashed += len(block)

    def read(self, rows: RowRange, hashed: bool) -> Tensor:
        if self._header.pickled is not None:
            tensor = self._header.pickled[rows.spec.name]
            part = tensor[rows.first : rows.last] if rows.spec.shape else tensor
            return part.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
        start = self._starts[rows.spec.name] + rows.first * rows.spec.bytes_per_row
        block = self._pread(rows.num_bytes, start)
        end = start + len(block)
        if hashed and end > self._hashed:
            self._hash_to(start)
            self._sha256.update(block[self._hashed - start :].numpy().data)
            self._hashed = end
        return block

    def facts(self) -> dict[str, Any]:
        """Size and sha256 of the whole file; bytes that no read has passed yet are read now."""
        self._hash_to(self._num_bytes)
        return {"bytes": self._num_bytes, "sha256": self._sha256.hexdigest()}

    def close(self) -> None:
        self._file.close()


class Source:
    """The opened weight files of a model: a context manager."""

    def __init__(self, stored: StoredWeights) -> None:
        self._shards = stored.shards
        self._shard_of = {
            spec.name: shard.path.name for shard in stored.shards for spec in shard.tensors
        }

    def __enter__(self) -> Source:
        self._files = {shard.path.name: _File(shard) for shard in self._shards}
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()

    def read(self, rows: RowRange, hashed: bool = False) -> Tensor:
        """The bytes of the rows, uint8, in memory that the caller may overwrite."""
        return self._files[self._shard_of[rows.spec.name]].read(rows, hashed)

    def blocks(self, ranges: Iterable[RowRange]) -> Iterator[Tensor]:
        """The bytes of each range, a few read ahead by a thread, and hashed."""
        with ThreadPoolExecutor(max_workers=1) as thread:
            pending: deque[Future[Tensor]] = deque()
            for rows in ranges:
                pending.append(thread.submit(self.read, rows, True))
                if len(pending) > BLOCKS_IN_FLIGHT:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def facts(self, name: str) -> dict[str, Any]:
        """Size in bytes and sha256 of a weight file, which is read to its end for them."""
        return self._files[name].facts()
