"""Blocks of rows: how a tensor is cut into them, and how a safetensors file is written of them.

The library's own writer wants every tensor of a file at once; a checkpoint's shard is 2 to 10 GB.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qwen_ds.disk.weights import TensorSpec, header_bytes

# Blocks read ahead, and blocks waiting to be written: enough for the disk, the hashes and the sums
# to run side by side.
BLOCKS_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows first..last of a stored tensor, which are read, changed and written at once."""

    spec: TensorSpec
    first: int
    last: int

    @property
    def num_bytes(self) -> int:
        return (self.last - self.first) * self.spec.bytes_per_row


def row_ranges(spec: TensorSpec, first: int, last: int, block_bytes: int) -> Iterator[RowRange]:
    """Cut a tensor's rows first..last into ranges of about `block_bytes`, at least one row each."""
    rows = max(1, block_bytes // max(1, spec.bytes_per_row))
    for start in range(first, last, rows):
        yield RowRange(spec, start, min(start + rows, last))


class BlockWriter:
    """A safetensors file that is written block by block, in the order of its header.

    A context manager: entering it writes the header, leaving it waits for the disk's answers. The
    folder is not published yet, so the file has its own name at once (see qwen_ds/disk/write.py).
    """

    def __init__(self, path: Path, tensors: Iterable[TensorSpec], metadata: dict[str, str]) -> None:
        self.path = path
        specs = tuple(tensors)
        self._expected = sum(spec.num_bytes for spec in specs)
        self.header = header_bytes(specs, metadata)

    def __enter__(self) -> BlockWriter:
        self._sha256 = hashlib.sha256()
        self._written = 0
        self._pending: deque[tuple[Future[None], Future[None]]] = deque()
        # One thread each: neither the checksum nor the disk waits for the other.
        self._writing = ThreadPoolExecutor(max_workers=1)
        self._hashing = ThreadPoolExecutor(max_workers=1)
        self._file = self.path.open("wb", buffering=0)
        self._submit(memoryview(self.header))
        return self

    def _write(self, block: memoryview) -> None:
        while block:
            block = block[self._file.write(block) :]

    def _submit(self, block: memoryview) -> None:
        hashed = self._hashing.submit(self._sha256.update, block)
        self._pending.append((self._writing.submit(self._write, block), hashed))

    def write(self, block: memoryview) -> None:
        """Hand over the next bytes; the caller leaves them alone afterwards."""
        self._written += block.nbytes
        self._submit(block)
        while len(self._pending) > BLOCKS_IN_FLIGHT:
            self._wait()

    def _wait(self) -> None:
        for done in self._pending.popleft():
            done.result()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            while self._pending and error is None:
                self._wait()
        finally:
            self._writing.shutdown(cancel_futures=True)
            self._hashing.shutdown(cancel_futures=True)
            self._file.close()
        if error is None:
            assert self._written == self._expected, (
                f"{self.path}: {self._written} bytes, header says {self._expected}"
            )
            os.chmod(self.path, 0o644)  # whatever the umask: a server may run as another user

    def sha256(self) -> str:
        """The file's checksum, in hex, once all is written."""
        return self._sha256.hexdigest()
