"""The cache of token rows: made once, never stale, complete or absent."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_ds.data.rows import cache as row_cache
from qwen_ds.data.rows.row_file import RowWriter
from qwen_ds.data.rows.token_rows import prepare
from qwen_ds.errors import UserError
from qwen_ds.model.tokenizer import load_encoding
from qwen_ds.recipe.options import DataOptions


@pytest.fixture
def times_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry each time that rows are made."""
    made: list[int] = []
    fill = row_cache._fill

    def counting(*args: object) -> None:
        made.append(1)
        fill(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(row_cache, "_fill", counting)
    return made


def test_rows_are_made_once(data: DataOptions, small_dir: Path, times_made: list[int]) -> None:
    first = prepare(data, load_encoding(small_dir), 64).train
    again = prepare(
        replace(data, weights=[2.0, 0.5], eval_fraction=0.25), load_encoding(small_dir), 64
    )
    assert len(times_made) == 1, "weights and splits are choices among the same rows"
    assert again.train.sha256 != first.sha256 and len(again.train) < len(first)


CHANGES = {
    "learn_on": "answer",
    "max_prompt_tokens": 40,
    "max_answer_tokens": 40,
    "max_tokens": 300,
    "special_tokens_in_text": "parse",
    "system": "Be brief.",
    "bad_rows": "skip",
    "train": [],
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_decides_a_row_makes_new_rows(
    data: DataOptions, small_dir: Path, times_made: list[int], name: str
) -> None:
    prepare(data, load_encoding(small_dir), 64)
    prepare(
        replace(data, **{name: CHANGES[name] or data.train[::-1]}), load_encoding(small_dir), 64
    )
    assert len(times_made) == 2


def test_changed_code_makes_new_rows(
    data: DataOptions, small_dir: Path, times_made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(data, load_encoding(small_dir), 64)
    monkeypatch.setattr(row_cache, "_code_sha256", lambda: "a mended reader")
    prepare(data, load_encoding(small_dir), 64)
    assert len(times_made) == 2


def test_a_changed_file_makes_new_rows(
    data: DataOptions, small_dir: Path, times_made: list[int]
) -> None:
    before = prepare(data, load_encoding(small_dir), 64).train
    with Path(data.train[0]).open("a", encoding="utf-8") as file:
        file.write('{"content": "q", "summary": "a"}\n')
    after = prepare(data, load_encoding(small_dir), 64).train
    assert len(times_made) == 2
    assert before.sha256 != after.sha256


def test_another_vocabulary_makes_new_rows(
    data: DataOptions, small_dir: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(small_dir, tmp_path / "other"))
    lines = (other / "qwen.tiktoken").read_bytes().splitlines(keepends=True)
    (other / "qwen.tiktoken").write_bytes(b"".join(lines[:-20]))
    assert (
        prepare(data, load_encoding(small_dir), 64).train.pad_id - 20
        == prepare(data, load_encoding(other), 64).train.pad_id
    )


def test_one_of_many_at_once_makes_the_rows(
    data: DataOptions, small_dir: Path, times_made: list[int]
) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(prepare(data, load_encoding(small_dir), 64).train.sha256)
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert len(times_made) == 1


def test_a_cache_that_cannot_be_written_is_named(data: DataOptions, small_dir: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl: .*data\.cache_dir"):
        prepare(replace(data, cache_dir=data.train[0]), load_encoding(small_dir), 64)


def raising(number: int) -> Callable[..., None]:
    return lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number)))


def test_an_unreadable_file_is_named(
    data: DataOptions, small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_cache, "_file_sha256", raising(errno.EACCES))
    with pytest.raises(UserError, match=r"a\.jsonl: Permission denied; expected a readable file"):
        prepare(data, load_encoding(small_dir), 64)


def cache_of(data: DataOptions) -> Path:
    return Path(str(data.cache_dir))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_file_that_was_cut_short_is_made_again(
    data: DataOptions, small_dir: Path, times_made: list[int], share: float
) -> None:
    good = prepare(data, load_encoding(small_dir), 64).train[3][0].tolist()
    (file,) = cache_of(data).glob("*.arrow")
    os.truncate(file, int(share * file.stat().st_size))
    assert prepare(data, load_encoding(small_dir), 64).train[3][0].tolist() == good
    assert len(times_made) == 2


@pytest.mark.parametrize("what", ["flipped bit", "other inputs", "text", "fifo", "dangling link"])
def test_a_file_that_cannot_be_trusted_is_made_again_and_said(
    data: DataOptions,
    small_dir: Path,
    times_made: list[int],
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    good = prepare(data, load_encoding(small_dir), 64).train
    rows = [good[i][0].tolist() for i in range(len(good))]
    (file,) = cache_of(data).glob("*.arrow")
    if what == "flipped bit":
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 1
        file.write_bytes(content)
    elif what == "other inputs":
        prepare(replace(data, learn_on="answer"), load_encoding(small_dir), 64)
        (other,) = set(cache_of(data).glob("*.arrow")) - {file}
        other.replace(file)
        times_made.pop()
    else:
        file.unlink()
    if what == "text":
        file.write_text("mine")
    elif what == "fifo":
        os.mkfifo(file)
    elif what == "dangling link":
        file.symlink_to("nowhere")
    assert capsys.readouterr().out == ""
    again = prepare(data, load_encoding(small_dir), 64).train
    assert [again[i][0].tolist() for i in range(len(again))] == rows
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"{file}: " in said and "are made anew" in said
    assert len(times_made) == 2 and again.report["sha256"] == good.report["sha256"]


def test_a_folder_under_the_name_of_the_rows_is_named_and_left_alone(
    data: DataOptions, small_dir: Path
) -> None:
    prepare(data, load_encoding(small_dir), 64)
    (file,) = cache_of(data).glob("*.arrow")
    file.unlink()
    (file / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match=r"\.arrow: a folder; .*data\.cache_dir"):
        prepare(data, load_encoding(small_dir), 64)
    assert (file / "mine").is_dir()


def test_a_run_that_broke_off_leaves_nothing_that_counts(
    data: DataOptions, small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RowWriter, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(data, load_encoding(small_dir), 64)
    (lock,) = cache_of(data).iterdir()
    # As SIGKILL would have left it.
    (cache_of(data) / f".{lock.stem}.arrow.99999.unfinished").write_bytes(b"half")
    assert len(prepare(data, load_encoding(small_dir), 64).train) == 12
    names = {path.name for path in cache_of(data).iterdir()}
    assert names == {f"{lock.stem}.arrow", lock.name}


def test_without_locks_each_process_writes_a_file_of_its_own(
    data: DataOptions, small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", raising(errno.ENOLCK))
    other = []

    def meanwhile(target: Path, *args: object) -> None:
        if not other:
            other.append(target)
            monkeypatch.setattr(row_cache.os, "getpid", lambda: 99999)
            other.append(prepare(data, load_encoding(small_dir), 64).train.sha256)
        fill(target, *args)  # type: ignore[arg-type]

    fill = row_cache._fill
    monkeypatch.setattr(row_cache, "_fill", meanwhile)
    assert prepare(data, load_encoding(small_dir), 64).train.sha256 == other[1]


def test_the_cache_is_not_blamed_for_other_failures(
    data: DataOptions, small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stands for everything besides the file, such as starting the workers.
    monkeypatch.setattr(row_cache, "encode_all", raising(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        prepare(data, load_encoding(small_dir), 64)


def test_the_cache_is_blamed_for_a_file_that_the_disk_does_not_keep(
    data: DataOptions, small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_ds.disk.write.sync", raising(errno.ENOSPC))
    with pytest.raises(UserError, match=r"cache: No space left on device; .*data\.cache_dir"):
        prepare(data, load_encoding(small_dir), 64)
