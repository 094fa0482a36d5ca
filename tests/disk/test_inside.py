"""Which files of a folder may be copied out of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ds.disk.inside import read_own
from qwen_ds.errors import UserError


def test_a_file_and_a_link_within_the_folder_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("free")
    (tmp_path / "inner").mkdir()
    (tmp_path / "LICENSE").symlink_to("inner/../a")
    (tmp_path / "here").symlink_to(tmp_path)
    assert read_own(tmp_path, "a") == read_own(tmp_path, "LICENSE") == b"free"
    assert read_own(tmp_path / "here", "LICENSE") == b"free"


def hub_cache(place: Path, name: str = "models--acme--tiny") -> tuple[Path, Path]:
    snapshot, blobs = place / name / "snapshots" / "0a1b", place / name / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    return snapshot, blobs


def test_a_hub_cache_has_its_own_blobs_and_no_other_s(tmp_path: Path) -> None:
    snapshot, blobs = hub_cache(tmp_path)
    (blobs / "c0ffee").write_text("free")
    (snapshot / "LICENSE").symlink_to("../../blobs/c0ffee")
    assert read_own(snapshot, "LICENSE") == b"free"
    _, others = hub_cache(tmp_path, "models--acme--secret")
    (others / "c0ffee").write_text("secret")
    for name, target in (("other", others / "c0ffee"), ("above", tmp_path / "x")):
        target.write_text("secret")
        (snapshot / name).symlink_to(target)
        with pytest.raises(UserError, match=f"{name}: a link that leaves the folder"):
            read_own(snapshot, name)


def test_a_cache_whose_blobs_lie_on_another_disk_is_read(tmp_path: Path) -> None:
    snapshot, blobs = hub_cache(tmp_path / "home")
    blobs.rename(tmp_path / "large_disk")
    blobs.symlink_to(tmp_path / "large_disk")
    (tmp_path / "large_disk" / "c0ffee").write_text("free")
    (snapshot / "LICENSE").symlink_to("../../blobs/c0ffee")
    assert read_own(snapshot, "LICENSE") == b"free"


def test_a_folder_that_was_linked_together_from_another_has_that_one_s_files(
    tmp_path: Path,
) -> None:
    real, linked = tmp_path / "Qwen-7B-Chat", tmp_path / "mine"
    for folder in (real, linked):
        folder.mkdir()
    for name in ("config.json", "LICENSE"):
        (real / name).write_text("free")
        (linked / name).symlink_to(real / name)
    assert read_own(linked, "LICENSE") == b"free"
    (tmp_path / "id_rsa").write_text("secret")
    (linked / "NOTICE").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(UserError, match="a link that leaves the folder"):
        read_own(linked, "NOTICE")


def test_a_folder_with_the_name_of_a_cache_s_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / "0a1b"
    folder.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a").write_text("secret")
    (folder / "LICENSE").symlink_to("../../blobs/a")
    with pytest.raises(UserError, match="a link that leaves the folder"):
        read_own(folder, "LICENSE")
