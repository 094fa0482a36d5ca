"""Places to write in: what is wrong with one is said before any work is done for it."""

from __future__ import annotations

import errno
import os
import pwd
import stat
import tempfile
from pathlib import Path

import pytest

from qwen_ds.disk.place import (
    cache_home,
    given_path,
    output_file,
    refuse_input,
    require_folder,
)
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


def _loop(here: Path) -> str:
    (here / "loop").symlink_to(here / "other")
    (here / "other").symlink_to(here / "loop")
    return str(here / "loop")


# A path as it is given, and the end of its message.
WRONG = {
    "a loop of links": (_loop, "a loop of symbolic links; expected a path that leads somewhere"),
    "below a loop": (lambda here: _loop(here) + "/x/y", "a loop of symbolic links; expected .*"),
    "an unknown user": (lambda here: "~nosuch/x", "no such user's home; expected a path .*"),
    "a variable": (
        lambda here: f"{here}/${{RUNS}}/x", r"\$\{RUNS\} is for a shell, and nothing here .*",
    ),
    "a bare variable": (lambda here: "$HOME/x", r"\$HOME is for a shell, and nothing here .*"),
    "a zero byte": (lambda here: "a\0b", "it has a zero byte; expected a path"),
    "a lone surrogate": (lambda here: "a\ud800", "it has a character that no name can have; .*"),
    "a long part": (lambda here: f"no/{'x' * 256}/y", "too long; expected at most 255 bytes .*"),
    "a long part in UTF-8": (lambda here: "\u88d9" * 86, "too long; expected at most 255 bytes .*"),
    "a long path": (lambda here: "x/" * 2048, "too long; .* 4095 in all"),
    "nothing": (lambda here: "", "empty; expected a path"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_path_that_cannot_be_meant_is_one_line_that_names_the_option(
    tmp_path: Path, what: str
) -> None:
    make, told = WRONG[what]
    with pytest.raises(UserError, match=rf"^cache_dir is '.*': {told}$") as error:
        given_path("cache_dir", make(tmp_path))
    assert len(str(error.value)) < 500


def test_a_path_where_nobody_may_look_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: object) -> os.stat_result:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "stat", denied)
    with pytest.raises(UserError, match="output is '/far/x': no permission to look there"):
        given_path("output", "/far/x")


def test_a_path_is_taken_as_it_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    assert given_path("x", "~/runs") == "/home/me/runs"
    for plain in ("runs/a", "Qwen/Qwen-7B", "folder:train", "x~", "5$", "a" * 255, "-"):
        assert given_path("x", plain) == plain
    for odd in ("~odd", "$odd", "${ODD}"):  # a file that really has the name
        (tmp_path / odd).touch()
        assert given_path("x", odd) == odd


def test_caches_lie_where_the_user_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert cache_home() == Path("/scratch/qwen_ds")
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_home() == Path("/home/me/.cache/qwen_ds")


def test_a_user_without_a_home_has_a_cache_of_his_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = cache_home()
    assert folder == tmp_path / f"qwen_ds-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and cache_home() == folder
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    (tmp_path / "qwen_ds-4711").mkdir()
    with pytest.raises(UserError, match="qwen_ds-4711: another user's; expected a home folder"):
        cache_home()


@pytest.mark.parametrize("output", ["/", ".", ""])
def test_an_output_without_a_name_is_refused(output: str) -> None:
    with pytest.raises(UserError, match="expected the name of a file"):
        output_file(output)


def test_an_output_is_no_input_whatever_its_name(tmp_path: Path) -> None:
    folder, link = tmp_path / "data", tmp_path / "link"
    (folder / "deep").mkdir(parents=True)
    (folder / "a").touch()
    link.symlink_to(folder / "a")
    for output in (folder / "a", link, folder / "deep" / ".." / "a", folder / "new"):
        with pytest.raises(UserError, match=r"this command reads .*; expected an output that is"):
            refuse_input(output, ["Qwen/Qwen-7B", folder if output.name == "new" else folder / "a"])
    refuse_input(tmp_path / "data2", [folder])
    refuse_input(folder / "deep" / "new", [folder / "a", folder / "gone"])


def test_a_working_folder_that_is_gone_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="output is 'x': the working folder is gone; expected"):
        given_path("output", "x")
    assert given_path("output", str(tmp_path / "x")) == str(tmp_path / "x")
