"""python -m qwen_ds.data check: what it prints, writes and ends with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from qwen_ds.data import __main__ as command
from qwen_ds.data.doctor.options import CheckCommand
from qwen_ds.data.doctor.table import NOTHING
from qwen_ds.errors import UserError
from tests.data.doctor.test_judge import rows, write

Check = Callable[..., int]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Check:
    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["data", "check", *map(str, words)])
        return command.main()

    return call


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    made: list[Any] = rows(12)
    made[2]["output"] = "电话是13812345678。"
    made[4] = made[1]
    made[6]["output"] = ""
    made[8]["output"] += "</s>"
    path = tmp_path / "rows.jsonl"
    write(path, made)
    with path.open("a") as file:
        file.write("{not json\n")
    return path


def messages(texts: list[str]) -> list[dict[str, str]]:
    roles = cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_findings_go_to_the_terminal_and_nothing_is_written(
    check: Check, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(damaged.parent.iterdir())
    assert check(damaged) == 0
    out = capsys.readouterr().out
    for kind, line in (("exact-duplicate", 5), ("phone", 3), ("empty-answer", 7)):
        assert kind in out and f"{damaged}:{line}" in out
    assert "unreadable-row" in out and "13 rows checked" in out
    assert sorted(damaged.parent.iterdir()) == before


def test_personal_data_are_shown_masked_everywhere(
    check: Check, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(damaged, "--output", tmp_path / "out")
    written = [path.read_text() for path in (tmp_path / "out").iterdir()]
    for text in (*written, capsys.readouterr().out):
        assert "138" in text and "13812345678" not in text and "12345" not in text


def test_kept_and_dropped_are_all_that_was_read(
    check: Check, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = tmp_path / "clean.jsonl"
    assert check(damaged, "--write", clean) == 0
    kept, dropped = lines(clean), lines(tmp_path / "dropped.jsonl")
    assert len(kept) + len(dropped) == 13
    given = damaged.read_text().splitlines()
    out = {4: "exact-duplicate", 2: "phone", 6: "empty-answer", 8: "special-token-in-text"}
    left = [json.loads(row) for at, row in enumerate(given[:12]) if at not in out]
    assert kept == left, "rows as they were read, in their order"
    reasons = {row["source"]: row["reasons"] for row in dropped}
    assert reasons == {
        **{f"{damaged}:{at + 1}": [kind] for at, kind in out.items()},
        f"{damaged}:13": ["unreadable-row"],
    }
    assert [row["row"] for row in dropped[:4]] == [json.loads(given[at]) for at in sorted(out)]
    assert "8 rows" in capsys.readouterr().out
    assert check(clean) == 0
    assert NOTHING in capsys.readouterr().out, "a clean file is clean"


def test_a_folder_of_results_has_findings_summary_and_page(
    check: Check, damaged: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    check(damaged, "--output", out)
    assert sorted(path.name for path in out.iterdir()) == [
        "findings.jsonl", "report.html", "summary.json"
    ]  # fmt: skip
    found = lines(out / "findings.jsonl")
    assert all(list(row) == ["finding", "severity", "file", "line", "detail"] for row in found)
    assert {(row["finding"], row["line"]) for row in found} == {
        ("exact-duplicate", 5), ("phone", 3), ("empty-answer", 7), ("special-token-in-text", 9),
        ("unreadable-row", 13),
    }  # fmt: skip
    assert {row["file"] for row in found} == {str(damaged)}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rows"] == 13 and summary["not_trained_on"] == {
        "no answer": 1, "not valid JSON": 1
    }  # fmt: skip
    first = summary["findings"][0]
    assert first["finding"] == "unreadable-row" and first["severity"] == "stop"
    assert set(first) == {"finding", "severity", "count", "share", "examples", "advice"}
    page = (out / "report.html").read_text()
    assert "<mark>&lt;/s&gt;</mark>" in page and "unreadable-row" in page


@pytest.mark.parametrize(
    ("made", "fail_on", "code"),
    [("note", "warn", 0), ("note", "note", 1), ("warn", "warn", 1), ("warn", "stop", 0),
     ("warn", "never", 0)],
)  # fmt: skip
def test_the_exit_code_says_how_bad_it_is(
    check: Check, tmp_path: Path, made: str, fail_on: str, code: int
) -> None:
    table = rows(10)
    table[3]["output"] = "Ａ和Ｂ。" if made == "note" else "好的。</s>"
    assert check(write(tmp_path / "a.jsonl", table), "--fail_on", fail_on) == code


def test_nothing_is_overwritten_unasked(check: Check, damaged: Path, tmp_path: Path) -> None:
    mine = tmp_path / "dropped.jsonl"
    mine.write_text("mine")
    for words in (("--write", tmp_path / "clean.jsonl"), ("--output", tmp_path / "out")):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "summary.json").write_text("mine")
        with pytest.raises(UserError, match="exists; expected a new file, or --overwrite"):
            check(damaged, *words)
    assert mine.read_text() == "mine" and not (tmp_path / "clean.jsonl").exists()
    check(damaged, "--write", tmp_path / "clean.jsonl", "--overwrite")
    assert len(lines(mine)) == 5


def test_no_output_is_an_input(check: Check, damaged: Path, tmp_path: Path) -> None:
    before = damaged.read_bytes()
    link = tmp_path / "link.jsonl"
    link.symlink_to(damaged)
    for output in (damaged, link):
        with pytest.raises(UserError, match="expected an output that is no input"):
            check(damaged, "--write", output, "--overwrite")
    with pytest.raises(UserError, match="expected another name"):
        check(damaged, "--write", tmp_path / "dropped.jsonl")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "a.jsonl", rows(5))
    with pytest.raises(UserError, match="no input"):
        check(folder, "--output", folder)
    assert damaged.read_bytes() == before


def test_a_file_that_cannot_be_read_leaves_nothing_behind(
    check: Check, damaged: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match="the file is empty"):
        check(damaged, empty, "--write", tmp_path / "clean.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_mistakes_on_the_command_line_are_one_line_each(check: Check, damaged: Path) -> None:
    for words, came in (
        ((), "no files"),
        ((damaged, "--data.train", damaged), "expected one of them"),
        ((damaged, "--adapter", "x"), "without --model"),
        ((damaged, "--fail_on", "loud"), "fail_on"),
        (("missing.jsonl",), "no such file"),
    ):
        with pytest.raises(UserError, match=came):
            check(*words)


def test_options_of_reading_are_those_of_training(
    check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [{"q": row["instruction"], "a": row["output"]} for row in rows(8)]
    file = write(tmp_path / "a.jsonl", made)
    columns = '{"instruction": "q", "output": "a"}'
    clean = tmp_path / "clean.jsonl"
    assert check(file, "--data.columns", columns, "--write", clean) == 0
    assert NOTHING in capsys.readouterr().out and lines(clean) == made


@pytest.mark.parametrize("format", ("trees", "arrays", "history"))
def test_rows_of_every_shape_are_kept_or_dropped(check: Check, tmp_path: Path, format: str) -> None:
    source = Path(__file__).parents[2] / "formats"
    name = {"trees": "oasst1_messages.jsonl", "arrays": "hc3_chinese.jsonl",
            "history": "llamafactory_alpaca.json"}[format]  # fmt: skip
    clean = tmp_path / "clean.jsonl"
    check(source / name, "--write", clean, "--output", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    kept, dropped = len(lines(clean)), len(lines(tmp_path / "dropped.jsonl"))
    assert (kept, dropped) == (summary["kept"], summary["dropped"])
    assert kept + dropped == summary["rows"] and kept + dropped > 0


def test_options_have_defaults_that_touch_nothing() -> None:
    from qwen_ds.recipe.options import DataOptions

    options = CheckCommand(data=DataOptions())
    assert (options.write, options.output, options.model, options.fail_on) == (
        None, None, None, "never"
    )  # fmt: skip


def test_rows_whose_limit_is_not_known_are_told_of(
    check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [
        {"from": who, "value": f"{who}的第{at}句话。"} for at in "一二" for who in ("user", "gpt")
    ]
    path = tmp_path / "rows.jsonl"
    write(path, [*rows(5), {"conversations": turns}])
    told = "lengths of 1 multi-turn rows need --model or data.max_tokens"
    assert check(path) == 0
    assert told in capsys.readouterr().out
    assert check(path, "--data.max_tokens", 2048) == 0
    assert told not in capsys.readouterr().out
    assert check(path, "--data.learn_on", "answer") == 0
    assert "lengths of 6 rows need" in capsys.readouterr().out


def test_what_a_row_holds_beside_its_conversation_is_said(
    check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talks = [
        [
            {"role": "user", "content": f"问题{i}是什么？"},
            {"role": "assistant", "content": f"答案{i}。"},
        ]
        for i in range(3)
    ]
    talks[1].append({"role": "user", "content": "后来呢？"})
    path = tmp_path / "rows.jsonl"
    write(path, [{"messages": talk, "kind": i} for i, talk in enumerate(talks)])
    check(path, "--output", tmp_path / "out")
    said = "not read: kind (3 rows), a last question without an answer (1 row)"
    assert said in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    counts = {"kind": 3, "a last question without an answer": 1}
    assert summary["not_read"] == {str(path): counts}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "a last question without an answer (1)" in page
