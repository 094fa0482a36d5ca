"""Writing that is complete or absent: what is seen under a name is whole, whenever it stops."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from qwen_ds.disk.write import (
    publish,
    remove_folder,
    replacing,
    unfinished_name,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files and folders that were brought to the disk, in order."""
    order: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    return order


def test_a_file_is_what_it_was_until_it_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as unfinished:
        unfinished.write_text("half")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old" and names(tmp_path) == ["a"]
    with replacing(path) as unfinished:
        unfinished.write_text("new")
    assert path.read_text() == "new" and names(tmp_path) == ["a"]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, synced: list[str]
) -> None:
    write_text(tmp_path / "a", "text")
    assert synced == [".a.unfinished", tmp_path.name]
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def test_the_checksum_is_that_of_the_file(tmp_path: Path) -> None:
    digest = write_json(tmp_path / "a.json", {"键": [1, None]})
    assert digest == hashlib.sha256((tmp_path / "a.json").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"键": [1, None]}
    assert "键" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_a_folder_is_on_the_disk_to_its_leaves_before_it_has_its_name(
    tmp_path: Path, synced: list[str]
) -> None:
    (tmp_path / "work" / "deep").mkdir(parents=True)
    (tmp_path / "work" / "deep" / "file").write_text("x")
    (tmp_path / "out").mkdir()  # an empty folder gives way
    publish(tmp_path / "work", tmp_path / "out")
    assert synced == ["file", "deep", "work", tmp_path.name]
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "deep" / "file").is_file()


def test_a_folder_with_something_in_it_gives_way_only_when_it_is_to_be_replaced(
    tmp_path: Path,
) -> None:
    for name in ("work", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    with pytest.raises(OSError, match="not empty"):
        publish(tmp_path / "work", tmp_path / "out")
    publish(tmp_path / "work", tmp_path / "out", replace=True)
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["work"]


def test_half_a_removed_folder_is_never_seen_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "unlink", killed)
        remove_folder(tmp_path / "a")
    assert names(tmp_path) == [".a.deleted"]
    (tmp_path / "a").mkdir()
    remove_folder(tmp_path / "a")  # takes the rest along
    assert names(tmp_path) == []


def test_processes_that_build_the_same_thing_use_names_of_their_own(tmp_path: Path) -> None:
    built = {unfinished_name(tmp_path / "a", owner) for owner in ("", "1", "2")}
    assert len(built) == 3 and all(path.name.startswith(".a.") for path in built)
