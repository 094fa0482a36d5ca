"""Small files: anything but one regular file of bounded size, in one line."""

from __future__ import annotations

import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_ds.disk.read import MAX_BYTES, open_regular, read_bytes, read_json, read_text
from qwen_ds.errors import UserError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not readable as JSON .*No such file"),
        (b"{", "not readable as JSON"),
        (b'{"a": "\xff"}', "not readable as JSON"),
        (b"[1]", "a JSON list; expected an object"),
        (b"\xef\xbb\xbf{}", "not readable as JSON .*BOM"),
        (b'{"a": ' + b"[" * 10**6, r"not readable as JSON \(nested too deeply\)"),
        (
            b'{"a": 1, "b": {"c": 1, "d": 2, "c": 1}}',
            r"not readable as JSON \(the key 'c' comes twice\)",
        ),
        (b'{"a": ' + b"1" * 5000 + b"}", "not readable as JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, .* `git lfs pull`"),
    ],
)
def test_what_is_not_an_object_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json: {message}") as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path may have 108 bytes
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)
    os.chdir(here)


@pytest.mark.parametrize(
    ("make", "came"),
    [
        (os.mkfifo, "a FIFO, not a regular file"),
        (os.mkdir, "a folder, not a regular file"),
        (a_socket, "a socket, not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "a device, not a regular file"),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
        (lambda path: path.symlink_to("nothing"), "No such file or directory"),
    ],
    ids=["FIFO", "folder", "socket", "device", "loop", "dangling"],
)
def test_nothing_but_a_regular_file_is_opened(
    make: Callable[[Path], object], came: str, tmp_path: Path
) -> None:
    make(tmp_path / "a")
    for read in (read_bytes, read_text, read_json):
        with pytest.raises(UserError, match=came):
            read(tmp_path / "a")
    with pytest.raises(OSError, match=came), open_regular(tmp_path / "a"):
        pass


def test_a_file_that_becomes_a_fifo_between_look_and_opening_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").touch()
    before = os.stat(tmp_path / "a")
    (tmp_path / "a").unlink()
    os.mkfifo(tmp_path / "a")
    monkeypatch.setattr(os, "stat", lambda path: before)
    with pytest.raises(UserError, match="a FIFO, not a regular file"):
        read_bytes(tmp_path / "a")


def test_a_file_without_end_costs_no_more_than_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    os.truncate(tmp_path / "a", 1 << 40)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a: more than 1 MiB; expected a regular file"):
        read_bytes(tmp_path / "a", 2**20)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    with pytest.raises(UserError, match=rf"more than {MAX_BYTES >> 20} MiB"):
        read_json(tmp_path / "a")


def test_a_text_is_utf_8(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("你好", encoding="utf-8")
    assert read_text(tmp_path / "a") == "你好"
    assert read_bytes(tmp_path / "a", 6) == "你好".encode()
    (tmp_path / "a").write_text("你好", encoding="gb18030")
    with pytest.raises(UserError, match="'utf-8' codec can't decode .* expected a text file"):
        read_text(tmp_path / "a")
