"""The short check before a run: bounded, silent when all is well, without effect on the rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ds.data.doctor import brief as module
from qwen_ds.data.doctor.brief import brief, lines
from qwen_ds.data.rows import cache
from qwen_ds.recipe.options import DataOptions
from tests.data.doctor.test_judge import rows, write


def test_sound_rows_say_nothing(tmp_path: Path) -> None:
    found = brief(DataOptions(train=[write(tmp_path / "a.jsonl", rows(40))]))
    assert found == [] and lines(found) == []


def test_the_worst_findings_come_in_a_few_lines_and_notes_are_kept_for_the_report(
    tmp_path: Path,
) -> None:
    made = rows(40)
    for at, mark in enumerate(
        ("</s>", "\u200b", "锟斤拷", "<br>", "\ufffd", "\u202e", "\x08", "Ａ")
    ):
        made[at]["output"] += mark
    made[39]["output"] = ""  # tokenising counts these
    file = write(tmp_path / "a.jsonl", made)
    found = brief(DataOptions(train=[file]))
    assert [each["finding"] for each in found][-1] == "full-width-ascii" and len(found) == 8
    told = lines(found)
    assert len(told) == module.MOST_LINES + 1 and told[-1] == "and 2 more kinds: data_report.json"
    assert f"warn: 1 special-token-in-text (first {file}:1)" in told


def test_only_the_first_rows_are_read(tmp_path: Path) -> None:
    made = rows(60)
    made[50]["output"] += "</s>"
    files = [write(tmp_path / name, made) for name in ("a.jsonl", "b.jsonl")]
    data = DataOptions(train=files[:1], eval=files[1:])
    kinds = [each["finding"] for each in brief(data, most=60)]
    assert kinds == ["duplicate-train-eval"], "thirty rows of each"
    assert "special-token-in-text" in [each["finding"] for each in brief(data, most=120)]


def test_rows_of_the_hub_are_not_fetched_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert brief(DataOptions(train=["somebody/some-set"])) == []


def test_the_doctor_is_no_part_of_the_key_of_cached_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = tmp_path / "data"
    for name in ("rows/cache.py", "doctor/kinds.py"):
        (room / name).parent.mkdir(parents=True)
        (room / name).write_text("before")
    monkeypatch.setattr(cache, "__file__", str(room / "rows" / "cache.py"))
    keys = []
    for changed in ("doctor/kinds.py", "rows/cache.py"):
        cache._code_sha256.cache_clear()
        keys.append(cache._code_sha256())
        (room / changed).write_text("after")
    cache._code_sha256.cache_clear()
    keys.append(cache._code_sha256())
    cache._code_sha256.cache_clear()
    assert keys[0] == keys[1] != keys[2]
