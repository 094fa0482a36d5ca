"""Safetensors files as streams of row blocks, in and out.

The library's own writer wants every tensor of a file at once; a checkpoint's shard is 2 to 10 GB.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from qwen_ds.disk.weights import BYTES_PER_ITEM, TensorSpec, header_bytes
from qwen_ds.errors import UserError

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
# Blocks read ahead, and blocks waiting to be written: enough that the disk, the hashes and the sums run side by side.
BLOCKS_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file in the order of their bytes, which start at `data_start`.

    Of a pickle, `pickled` holds the tensors, mapped into memory, and `data_start` means nothing.
    """

    path: Path
    tensors: tuple[TensorSpec, ...]
    metadata: dict[str, str]
    data_start: int
    pickled: Mapping[str, Tensor] | None = None

    @property
    def starts(self) -> dict[str, int]:
        """Where in the file each tensor's bytes begin."""
        sizes = [spec.num_bytes for spec in self.tensors]
        starts = accumulate(sizes, initial=self.data_start)
        return {spec.name: start for spec, start in zip(self.tensors, starts, strict=False)}


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows first..last of a stored tensor: what is read, changed and written at once."""

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


def read_header(path: Path) -> Header:
    """Read and check a file's header.

    Raises:
        UserError: no such file, not safetensors, or its size is not what the header says (a broken download).
    """

    def bad(reason: str) -> UserError:
        return UserError(f"{path}: {reason}; expected a whole safetensors file")

    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a safetensors file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise bad(f"{size} bytes hold no header")
        raw = file.read(length)
    try:
        entries: dict[str, Any] = json.loads(raw)
        metadata = entries.pop("__metadata__", None) or {}
        placed = sorted(
            ((int(first), int(last)), TensorSpec(name, entry["dtype"], tuple(map(int, entry["shape"]))))
            for name, entry in entries.items()
            for first, last in [entry["data_offsets"]]
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise bad(f"a broken header ({type(error).__name__})") from error
    position = 0
    for (first, last), spec in placed:
        if spec.dtype not in BYTES_PER_ITEM:
            raise bad(f"{spec.name} has dtype {spec.dtype}")
        if first != position or last - first != spec.num_bytes:
            raise bad(
                f"{spec.name} lies at {first}..{last}, not where its shape {list(spec.shape)} puts it"
            )
        position = last
    if size != 8 + length + position:
        raise bad(f"{size} bytes instead of {8 + length + position}")
    return Header(path, tuple(spec for _, spec in placed), metadata, 8 + length)


class BlockWriter:
    """Writes a safetensors file block by block: the header at once, then the tensors' bytes in its order.

    A context manager; leaving it waits for the disk's answers. `safetensors.safe_open` is the oracle in the tests.
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
        # One thread each, so that the checksum does not wait for the disk, nor the disk for the checksum.
        self._writing, self._hashing = (
            ThreadPoolExecutor(max_workers=1),
            ThreadPoolExecutor(max_workers=1),
        )
        self._file = self.path.open("wb", buffering=0)
        self._submit(memoryview(self.header))
        return self

    def _write(self, block: memoryview) -> None:
        while block:
            block = block[self._file.write(block) :]

    def _submit(self, block: memoryview) -> None:
        self._pending.append(
            (
                self._writing.submit(self._write, block),
                self._hashing.submit(self._sha256.update, block),
            )
        )

    def write(self, block: memoryview) -> None:
        """Hand over the next bytes; the caller leaves them alone afterwards."""
        self._written += block.nbytes
        self._submit(block)
        while len(self._pending) > BLOCKS_IN_FLIGHT:
            self._wait()

    def _wait(self) -> None:
        for done in self._pending.popleft():
            done.result()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
            # The library leaves 0600, which a server under another user cannot read.
            os.chmod(self.path, 0o644)

    def sha256(self) -> str:
        return self._sha256.hexdigest()
