"""The file of token rows: rows and sources come back, and a full disk is the user's matter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qwen_ds.data.rows import row_file
from qwen_ds.data.rows.blocks import Block, encode_block
from qwen_ds.data.rows.data_report import PartReport
from qwen_ds.data.rows.encode import EncodeOptions
from qwen_ds.data.rows.row_file import RowFile, RowWriter, fault
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import Conversation, Turn
from qwen_ds.model.tokenizer import load_encoding


def block_of(small_dir: Path, *numbers: int) -> Block:
    talks = [
        Conversation(None, (Turn("user", f"q{i}"), Turn("assistant", f"a{i}"))) for i in numbers
    ]
    return encode_block(load_encoding(small_dir), talks, EncodeOptions())


def test_rows_are_found_across_blocks(tmp_path: Path, small_dir: Path) -> None:
    blocks = [
        block_of(small_dir, *range(start, start + n)) for start, n in ((0, 3), (3, 1), (4, 5))
    ]
    with RowWriter(tmp_path / "x") as writer:
        for block in blocks:
            sources = [f"x:{i}" for i in range(len(block.length_K))]
            writer.add(block, sources, 0, PartReport("x"))
        writer.finish({})
    file = RowFile(tmp_path / "x")
    assert len(file) == 9
    assert np.concatenate([file.row(i)[0] for i in range(9)]).tolist() == [
        token for block in blocks for token in block.ids_N.tolist()
    ]
    assert np.concatenate([file.row(i)[1] for i in range(9)]).tolist() == [
        run for block in blocks for run in block.runs_R2.tolist()
    ]
    assert [file.source(i) for i in (0, 3, 4, 8)] == ["x:0", "x:0", "x:0", "x:4"]
    assert file.lengths().tolist() == [len(file.row(i)[0]) for i in range(9)]


def test_rows_stay_on_disk(tmp_path: Path, small_dir: Path) -> None:
    with RowWriter(tmp_path / "x") as writer:
        writer.add(block_of(small_dir, 1), ["x:1"], 0, PartReport("x"))
        writer.finish({})
    ids, runs = RowFile(tmp_path / "x").row(0)
    assert not ids.flags.owndata and not runs.flags.owndata and not ids.flags.writeable


def test_only_finish_makes_a_whole_file(tmp_path: Path, small_dir: Path) -> None:
    assert fault(tmp_path / "x", "k") == "No such file or directory"
    with RowWriter(tmp_path / "x") as writer:
        writer.add(block_of(small_dir, 1), ["x:1"], 0, PartReport("x"))
    assert "cut short" in str(fault(tmp_path / "x", "k"))
    assert fault(whole_file(tmp_path / "y", small_dir), "k") is None


def whole_file(path: Path, small_dir: Path) -> Path:
    """The rows of the key "k"."""
    with RowWriter(path) as writer:
        writer.add(
            block_of(small_dir, *range(50)), [f"x:{i}" for i in range(50)], 0, PartReport("x")
        )
        writer.finish({"key": "k"})
    return path


@pytest.mark.parametrize("chunk", [1 << 24, 100])
def test_a_flipped_bit_anywhere_is_found(
    tmp_path: Path, small_dir: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(row_file, "CHUNK_BYTES", chunk)
    path = whole_file(tmp_path / "y", small_dir)
    good = path.read_bytes()
    for place in (*range(0, len(good), 397), *range(len(good) - 60, len(good))):
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        assert fault(path, "k"), place
    path.write_bytes(good)
    assert fault(path, "k") is None


def test_what_is_not_the_file_of_its_name_is_not_used(tmp_path: Path, small_dir: Path) -> None:
    path = whole_file(tmp_path / "y", small_dir)
    assert fault(path, "another key") == "the rows of other inputs"
    os.mkfifo(tmp_path / "fifo")
    assert fault(tmp_path / "fifo", "k") == fault(tmp_path, "k") == "not a file"
    (tmp_path / "text").write_text("mine" * 99)
    assert "not a file of token rows" in str(fault(tmp_path / "text", "k"))
    good = path.read_bytes()
    for length in (0, 5, 23, 24, 25, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        assert fault(path, "k"), length


def test_a_checksum_that_another_rank_has_compared_is_taken_on_trust(
    tmp_path: Path, small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = whole_file(tmp_path / "y", small_dir)
    monkeypatch.setattr(row_file, "_checksum", lambda *_: pytest.fail("read again"))
    assert fault(path, "k", every_byte=False) is None


def test_another_version_is_not_a_whole_file(tmp_path: Path, small_dir: Path) -> None:
    with RowWriter(tmp_path / "x") as writer:
        writer.finish({"key": "k", "format_version": 99})
    assert "of this version" in str(fault(tmp_path / "x", "k"))


@pytest.mark.parametrize("n_blocks", [1, 200])
def test_a_full_disk_is_a_users_mistake_that_names_the_cache(
    small_dir: Path, n_blocks: int
) -> None:
    block, sources = block_of(small_dir, *range(100)), [f"x:{i}" for i in range(100)]
    named = r"/dev: No space left on device; .*data\.cache_dir"
    with pytest.raises(UserError, match=named), RowWriter(Path("/dev/full")) as writer:
        for _ in range(n_blocks):
            writer.add(block, sources, 0, PartReport("x"))
        writer.finish({})


SOURCES = [
    *("x.jsonl:1", "x.jsonl:07", "x", "", "a2b.parquet#0", "t.tar:m10/n.json:3"),
    *("s.json:1 scene[12]", "x:99999999999999999999", "行\n.jsonl:5", "x.jsonl:2"),
]


def test_sources_come_back_as_they_were(tmp_path: Path) -> None:
    n = len(SOURCES)
    ones, places = np.ones(n, "<i4"), np.arange(1, n + 1, dtype="<i4")
    runs = np.tile(np.array([[0, 1]], "<i4"), (n, 1))
    hashes = np.arange(n, dtype="<u8")
    # The chunk's first conversation gave no row.
    dropped = [(0, "no turns")]
    block = Block(ones, runs, places, ones, ones, ones, hashes, hashes, dropped, [])
    with RowWriter(tmp_path / "x") as out:
        out.add(block, ["x.jsonl:0", *SOURCES], 0, PartReport("x"))
        out.finish({})
    rows = RowFile(tmp_path / "x")
    assert [rows.source(i) for i in range(n)] == SOURCES


def test_reading_rows_imports_no_pandas(tmp_path: Path, small_dir: Path) -> None:
    """pyarrow imports it to turn numbers into numpy's: 30 MB in every rank."""
    with RowWriter(tmp_path / "x") as writer:
        writer.add(block_of(small_dir, 1), ["x:1"], 0, PartReport("x"))
        writer.finish({})
    read = (
        "import sys; from pathlib import Path; from qwen_ds.data.rows.row_file import RowFile; "
        "rows = RowFile(Path(sys.argv[1])); rows.row(0), rows.lengths(), rows.column('part'); "
        "assert 'pandas.core' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", read, str(tmp_path / "x")], check=True)
