"""Places to write in: what is wrong with one is said before any work is done for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen_ds.disk.place import require_folder
from qwen_ds.errors import UserError


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    require_folder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    require_folder(tmp_path / "a" / "b", make=True)
    assert (tmp_path / "a" / "b").is_dir()
    for place in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(UserError, match="file: a file; expected a folder"):
            require_folder(place)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link: .*; expected a folder"):
        require_folder(tmp_path / "link", make=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match="no permission to write"):
        require_folder(tmp_path / "c" / "d")
