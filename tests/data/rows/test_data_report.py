"""What is reported of the rows, and which data sets stop a run before training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_ds.data.rows.data_report import PartReport, summary, total
from qwen_ds.data.rows.token_rows import TokenRows, prepare
from qwen_ds.errors import UserError
from qwen_ds.model.tokenizer import load_encoding
from qwen_ds.recipe.options import DataOptions

# Rows of a data set under other keys than the reader's that the user names.
ALPACA = [{"instruction": f"问题{i}", "input": "", "output": f"回答{i}"} for i in range(35)]


def write(path: Path, rows: list[object]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def rows_of(tmp_path: Path, small_dir: Path, *files: list[object], **options: object) -> TokenRows:
    paths = [write(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate(files)]
    data = DataOptions(train=paths, cache_dir=str(tmp_path / "cache"), **options)  # type: ignore[arg-type]
    return prepare(data, load_encoding(small_dir), 64).train


def test_every_row_is_accounted_for(tmp_path: Path, small_dir: Path) -> None:
    good = {"content": "q", "summary": "a"}
    rows = rows_of(
        tmp_path,
        small_dir,
        [
            good,
            "{broken",
            {"content": "q", "summary": " "},
            {"content": "r", "summary": "a"},
            {"summary": "b"},
            good,
        ],
        [
            {"content": "q" * 400, "summary": "a" * 300},
            {"content": "q", "summary": "a" * 600},
            good,
        ],
        bad_rows="skip",
        weights=[1.0, 0.5],
    )
    report = rows.report
    first, second = report["data_sets"]
    assert (first["read"], first["kept"], second["read"], second["kept"]) == (6, 3, 3, 3)
    (no_answer,) = first["dropped"].values()
    assert list(first["dropped"]) == ["no answer"]
    assert (no_answer["rows"], no_answer["first"]) == (1, f"{tmp_path}/0.jsonl:3")
    assert {reason: tally["rows"] for reason, tally in first["skipped"].items()} == {
        "not valid JSON": 1,
        "unknown keys": 1,
    }
    assert first["skipped"]["not valid JSON"]["first"] == f"{tmp_path}/0.jsonl:2"
    assert {what: (t["rows"], t["first"]) for what, t in second["truncated"].items()} == {
        "prompt cut": (1, f"{tmp_path}/1.jsonl:1"),
        "answer cut": (2, f"{tmp_path}/1.jsonl:1"),
    }
    assert report["answers_cut"] == 2
    assert (second["longest_tokens"], second["longest"]) == (508, f"{tmp_path}/1.jsonl:1")
    assert [part["weight"] for part in report["data_sets"]] == [1.0, 0.5]
    assert first["formats"] == {f"{tmp_path}/0.jsonl": "adgen"}
    assert report["total"]["tokens"] == rows.lens.sum() == first["tokens"] + second["tokens"]
    assert report["total"]["learnt_tokens"] == rows.learnt.sum()
    assert report["duplicates"] == 2
    lengths = report["lengths"]
    assert sum(lengths["rows"]) == sum(lengths["targets"]) == len(rows)
    assert lengths["edges"][-1] > max(rows.lens) and lengths["rows"] != lengths["targets"]
    json.dumps(report)


def test_a_conversation_that_lost_turns_is_counted(tmp_path: Path, small_dir: Path) -> None:
    talk = [{"role": ("user", "assistant")[t % 2], "content": f"word {t}"} for t in range(20)]
    rows = rows_of(
        tmp_path, small_dir, [{"messages": talk}, {"messages": talk[:2]}], max_tokens=150
    )
    assert rows.report["total"]["truncated"]["oldest turns dropped"]["rows"] == 1
    assert rows.lens.max() <= 150


def test_the_start_screen_names_what_was_lost(tmp_path: Path, small_dir: Path) -> None:
    rows = rows_of(
        tmp_path,
        small_dir,
        [
            {"content": "q", "summary": "a" * 600},
            {"content": "q", "summary": ""},
            "[1",
            {"content": "r", "summary": "b"},
        ],
        bad_rows="skip",
    )
    text = "\n".join(summary(rows.report))
    assert "2 rows of 4 read" in text
    assert f"1 dropped: no answer (first {tmp_path}/0.jsonl:2)" in text
    assert f"1 could not be read: not valid JSON (first {tmp_path}/0.jsonl:3)" in text
    assert f"1 too long: answer cut (first {tmp_path}/0.jsonl:1)" in text


def test_identical_rows_stop_the_run(tmp_path: Path, small_dir: Path) -> None:
    with pytest.raises(
        UserError, match=r"0\.jsonl: all its 35 rows come out identical .*the first .*0\.jsonl:1"
    ):
        rows_of(tmp_path, small_dir, [{"content": "q", "summary": "a"}] * 35)


def test_identical_rows_in_one_of_two_data_sets_stop_the_run(
    tmp_path: Path, small_dir: Path
) -> None:
    with pytest.raises(UserError, match=r"1\.jsonl: all its 2 rows come out identical"):
        rows_of(tmp_path, small_dir, [ALPACA[0], ALPACA[1]], [ALPACA[0]] * 2)


def test_a_single_row_or_a_last_row_that_differs_is_no_mistake(
    tmp_path: Path, small_dir: Path
) -> None:
    assert len(rows_of(tmp_path, small_dir, [ALPACA[0]], [*[ALPACA[0]] * 9, ALPACA[1]])) == 11


def test_rows_under_other_keys_stop_the_run_and_both_are_named(
    tmp_path: Path, small_dir: Path
) -> None:
    named = r"keys found: instruction, input, output; keys expected: content \+ summary"
    with pytest.raises(UserError, match=named):
        rows_of(tmp_path, small_dir, ALPACA, format="adgen")
    with pytest.raises(UserError, match=f"none of its 35 rows can be trained on.*{named}"):
        rows_of(tmp_path, small_dir, ALPACA, format="adgen", bad_rows="skip")


def test_rows_without_answers_stop_the_run_and_their_keys_are_named(
    tmp_path: Path, small_dir: Path
) -> None:
    empty = [{"content": f"q{i}", "summary": ""} for i in range(35)]
    with pytest.raises(UserError) as caught:
        rows_of(tmp_path, small_dir, empty)
    message = str(caught.value)
    assert "none of its 35 rows can be trained on: no answer (35 rows, the first" in message
    assert f"{tmp_path}/0.jsonl:1" in message and "keys found: content, summary" in message
    assert "\n" not in message


def test_a_stopped_run_leaves_no_cache_behind(tmp_path: Path, small_dir: Path) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match="identical"):
            rows_of(tmp_path, small_dir, [ALPACA[0]] * 3)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_columns_that_are_not_read_are_counted_and_said(tmp_path: Path, small_dir: Path) -> None:
    rows = [
        {"content": f"q{i}", "summary": "a", "id": i, "lang": "zh" if i else None} for i in range(3)
    ]
    found = rows_of(tmp_path, small_dir, rows).report
    assert found["data_sets"][0]["not_read"] == {"id": 3, "lang": 2}
    assert "not read: id (3 rows), lang (2 rows)" in summary(found)
    lines = summary(rows_of(tmp_path, small_dir, rows, rows[:1]).report)
    assert f"not read in {tmp_path}/0.jsonl: id (3 rows), lang (2 rows)" in lines
    assert f"not read in {tmp_path}/1.jsonl: id (1 row)" in lines


def test_the_commonest_reason_is_the_one_that_is_named() -> None:
    report = PartReport("x", read=3)
    report.drop("no question", "x:1")
    report.drop("no answer", "x:2", "keys found: a; keys expected: b")
    report.drop("no answer", "x:3", "another detail")
    with pytest.raises(
        UserError, match=r"no answer \(2 rows, the first x:2, 1 other reasons\); keys found: a"
    ):
        report.check()


def test_totals_add_up_and_keep_the_first_place() -> None:
    parts = [PartReport("x", read=2, kept=1, tokens=7), PartReport("y", read=3, kept=2, tokens=5)]
    parts[1].longest_tokens, parts[1].longest = 4, "y:3"
    parts[0].drop("no answer", "x:2")
    parts[1].drop("no answer", "y:1")
    parts[1].cut("answer cut", "y:3")
    found = total([part.to_dict() for part in parts])
    assert (found["read"], found["kept"], found["tokens"], found["longest"]) == (5, 3, 12, "y:3")
    assert found["dropped"]["no answer"] == {"rows": 2, "first": "x:2", "detail": ""}
    assert found["truncated"]["answer cut"]["rows"] == 1
    assert parts[0].dropped["no answer"].rows == 1, "adding up changes no part"


def test_the_format_of_every_file_is_reported(tmp_path: Path, small_dir: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    write(folder / "a.jsonl", [{"content": "q", "summary": "a"}])
    write(folder / "b.json", [{"scene": [{"prompt": "p", "response": "r"}]}])
    data = DataOptions(train=[str(folder)], cache_dir=str(tmp_path / "cache"))
    (found,) = prepare(data, load_encoding(small_dir), 64).train.report["data_sets"]
    assert found["formats"] == {f"{folder}/a.jsonl": "adgen", f"{folder}/b.json": "prompt"}
