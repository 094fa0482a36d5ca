"""The end of a command in one line; lines of JSON that survive kills and full disks."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from qwen_ds.runlog import JsonLines, run_command


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG])
def test_a_path_that_the_system_refuses_is_one_line_and_the_users_mistake(
    capsys: pytest.CaptureFixture[str], number: int
) -> None:
    """Wherever it comes up: no check of ours sees all that a file system may refuse."""

    def main() -> None:
        raise OSError(number, os.strerror(number), "/data/run")

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    told = f"error: /data/run: {os.strerror(number)}; expected a path that this user can use\n"
    assert capsys.readouterr().err == told


def test_an_error_of_the_system_that_names_no_path_is_a_defect() -> None:
    def main() -> None:
        raise OSError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        run_command(main)


def test_a_full_disk_ends_nothing(tmp_path: Path) -> None:
    """What /dev/full does not take waits; nothing counts as written that is not."""
    link = tmp_path / "metrics.jsonl"
    link.symlink_to("/dev/full")
    lines = JsonLines(link)
    for _ in range(100):
        lines.write({"text": "x" * 1000})
    assert lines.position() == 0
    lines.close()


def test_what_a_killed_run_wrote_after_its_checkpoint_is_written_anew(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = JsonLines(file)
    lines.write({"step": 1, "text": "\u4f60\u597d"})
    keep = lines.position()
    lines.write({"step": 2})
    lines.close()
    resumed = JsonLines(file, keep)
    resumed.write({"step": 2, "again": True})
    resumed.close()
    read = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert read == [{"step": 1, "text": "\u4f60\u597d"}, {"step": 2, "again": True}]
