"""Keys of clients: lines of a file, and what is no key is named by its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ds.errors import UserError
from qwen_ds.recipe.parser import parse_options
from serve.api.keys import read_keys
from serve.api.options import ApiOptions

OPEN = ["--model", "m", "--host", "0.0.0.0"]


def read(*words: str) -> list[str]:
    return read_keys(parse_options(ApiOptions, "", [*OPEN, *words]))


def test_keys_are_lines_of_a_file_and_open_hosts_without_them_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\n one \ntwo\n")
    file.chmod(0o600)
    words = ["--api_key_file", str(file)]
    assert read(*words, "--api_key", "three") == ["three", "one", "two"]
    assert capsys.readouterr().out == ""
    file.write_text("# nothing\n")
    with pytest.raises(UserError, match="holds no key"):
        read(*words)
    assert read() == []
    assert "whoever reaches it can use it" in capsys.readouterr().out
    for host in ("127.0.0.1", "127.0.0.8", "::1", "localhost"):  # nobody else reaches these
        assert read("--host", host) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["\ufeffone\r\ntwo\r\n", "\ufeff# ours\none\ntwo", "one\n\ntwo\n"])
def test_files_of_all_editors_are_read(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(text.encode())
    assert read("--api_key_file", str(file)) == ["one", "two"]


@pytest.mark.parametrize("key", ["two words", "schl\u00fcssel", "a\tb", "a\x0bb", "a\u2028b"])
def test_what_is_no_key_is_named_by_file_and_line_and_not_shown(tmp_path: Path, key: str) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(f"\ufeff# ours\n\n{key}\nlast\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"keys\.txt:3: a key .*; expected") as error:
        read("--api_key_file", str(file))
    assert str(error.value).startswith(str(file)) and key not in str(error.value)
    for given in (key, ""):
        with pytest.raises(UserError, match=r"^--api_key: a key"):
            read("--api_key", given)
