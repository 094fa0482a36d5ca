"""Lines of JSON that survive kills and full disks."""

from __future__ import annotations

import json
from pathlib import Path

from qwen_ds.runlog import JsonLines


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
