"""The demo's files: one complete folder, made once, by however many processes at once."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import qwen_ds  # noqa: F401  registers the model class
from qwen_ds import demo
from qwen_ds.demo import base, corpus
from qwen_ds.model.folder import inspect_folder


def test_prepare_called_by_several_at_once_gives_one_complete_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(demo.prepare, [tmp_path] * 3))
    assert len(found) == 1
    (paths,) = found
    assert [p.name for p in tmp_path.iterdir()] == [paths.model.parent.name]
    inspect_folder(paths.model)
    for file, rows in ((paths.train, corpus.train_rows()), (paths.eval, corpus.eval_rows())):
        assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == rows


def test_prepare_finds_what_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = demo.prepare(tmp_path)
    monkeypatch.setattr(base, "unpack_base", lambda target: pytest.fail("made again"))
    assert demo.prepare(tmp_path) == first


def test_prepare_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(target: Path) -> None:
        target.mkdir()
        raise OSError("no space left")

    monkeypatch.setattr(base, "unpack_base", fail)
    with pytest.raises(OSError, match="no space left"):
        demo.prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []
