"""Our streams of blocks against the safetensors library."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_ds.disk.shards import StoredWeights
from qwen_ds.disk.weights import TensorSpec, read_header
from qwen_ds.export.stream.blocks import BlockWriter, row_ranges
from qwen_ds.export.stream.source import Source

TENSORS = {
    "matrix": torch.arange(35, dtype=torch.float32).reshape(7, 5),
    "名字.weight": torch.arange(6, dtype=torch.float32).to(torch.bfloat16).reshape(2, 3),
    "bias": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "scalar": torch.tensor(3.25),
    "empty": torch.zeros(0, 4),
    "ids": torch.tensor([[1, 2], [3, 2**40]]),
    "flags": torch.tensor([True, False, True]),
}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt", "note": "x"})
    return tmp_path / "a.safetensors"


def rewrite(source: Path, target: Path, block_bytes: int) -> tuple[str, str]:
    header = read_header(source)
    ranges = [
        rows for spec in header.tensors for rows in row_ranges(spec, 0, spec.num_rows, block_bytes)
    ]
    with Source(StoredWeights(source.parent, (header,), None)) as reader:
        with BlockWriter(target, header.tensors, header.metadata) as writer:
            for block in reader.blocks(ranges):
                writer.write(block.numpy().data)
        return str(reader.facts(source.name)["sha256"]), writer.sha256()


@pytest.mark.parametrize("block_bytes", [1, 13, 1 << 20])
def test_the_library_reads_back_what_was_streamed(
    stored: Path, tmp_path: Path, block_bytes: int
) -> None:
    copy = tmp_path / "b.safetensors"
    rewrite(stored, copy, block_bytes)
    read = load_file(copy)
    assert set(read) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    assert read_header(copy).metadata == {"format": "pt", "note": "x"}


def test_checksums_are_those_of_the_files(stored: Path, tmp_path: Path) -> None:
    copy = tmp_path / "b.safetensors"
    digests = rewrite(stored, copy, 8)
    assert digests == tuple(
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (stored, copy)
    )


def test_a_written_file_can_be_read_by_others(stored: Path, tmp_path: Path) -> None:
    copy = tmp_path / "b.safetensors"
    rewrite(stored, copy, 8)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o644


def test_data_start_aligned_whatever_the_header_s_length(tmp_path: Path) -> None:
    for length in range(1, 9):
        with BlockWriter(
            tmp_path / "a.safetensors", [TensorSpec("x" * length, "F32", (1,))], {}
        ) as writer:
            writer.write(memoryview(bytes(4)))
        assert read_header(tmp_path / "a.safetensors").data_start % 8 == 0


def test_a_file_without_a_format_gets_one(tmp_path: Path) -> None:
    with BlockWriter(tmp_path / "a.safetensors", [TensorSpec("x", "F32", (1,))], {}) as writer:
        writer.write(memoryview(bytes(4)))
    assert read_header(tmp_path / "a.safetensors").metadata == {"format": "pt"}


def test_a_file_with_too_few_bytes_is_a_failure_of_ours(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="header says 8"),
        BlockWriter(tmp_path / "a.safetensors", [TensorSpec("x", "F32", (2,))], {}) as writer,
    ):
        writer.write(memoryview(bytes(4)))


def test_ranges_cover_each_row_once() -> None:
    spec = TensorSpec("x", "BF16", (10, 3))
    ranges = list(row_ranges(spec, 0, 10, 20))
    assert [(rows.first, rows.last) for rows in ranges] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert sum(rows.num_bytes for rows in ranges) == spec.num_bytes
    assert [(rows.first, rows.last) for rows in row_ranges(spec, 2, 5, 1)] == [
        (i, i + 1) for i in range(2, 5)
    ]
