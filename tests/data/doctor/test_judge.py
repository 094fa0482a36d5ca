"""Findings that only all rows together show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_ds.data.doctor import batch as look
from qwen_ds.data.doctor import examine as examining
from qwen_ds.data.doctor.endings import Endings
from qwen_ds.data.doctor.examine import AGAINST, EVAL, TRAIN, Pass, examine
from qwen_ds.data.doctor.judge import judge
from qwen_ds.data.doctor.limits import cuts
from qwen_ds.data.doctor.places import Places
from qwen_ds.data.doctor.spans import texts_of
from qwen_ds.data.doctor.tally import FindingTally
from qwen_ds.data.read.sources import ReadOptions
from qwen_ds.data.rows.encode import EncodeOptions, encode_row
from qwen_ds.model.chatml import Conversation, Turn
from qwen_ds.model.tokenizer import load_encoding
from qwen_ds.recipe.options import DataOptions
from tests.data.doctor.test_duplicates import text


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Sound rows that have nothing in common."""
    return [
        {"instruction": f"请说明{text(8, 2 * at)}？", "output": f"{text(30, 2 * at + 1)}。"}
        for at in range(start, start + count)
    ]


def write(path: Path, made: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made))
    return str(path)


def judged(*sides: tuple[int, str]) -> Pass:
    gathered = examine(sides, ReadOptions(), FindingTally(Places()), workers=0)
    judge(gathered, DataOptions(), None)
    return gathered


def places(gathered: Pass, kind: str) -> list[int]:
    """The lines of the examples of a kind."""
    found = gathered.tally.examples.get(kind, [])
    return [int(example["place"].rpartition(":")[2]) for example in found]


def test_sound_rows_give_no_finding(tmp_path: Path) -> None:
    assert not judged((TRAIN, write(tmp_path / "a.jsonl", rows(60)))).tally.counts


def test_copies_are_found_within_and_across_files_and_the_first_stays(tmp_path: Path) -> None:
    made = rows(20)
    one = write(tmp_path / "a.jsonl", [*made[:10], made[3]])
    two = write(tmp_path / "b.jsonl", [*made[10:], made[5]])
    found = judged((TRAIN, one), (TRAIN, two))
    assert found.tally.counts == {"exact-duplicate": 2}
    assert [e["place"] for e in found.tally.examples["exact-duplicate"]] == [
        f"{one}:11",
        f"{two}:11",
    ]
    assert found.tally.examples["exact-duplicate"][1]["detail"] == f"the same as {one}:6"


def test_a_training_row_in_the_evaluation_or_a_test_set_stops(tmp_path: Path) -> None:
    made = rows(30)
    train = write(tmp_path / "train.jsonl", made[:10])
    held = write(tmp_path / "eval.jsonl", [made[2], *made[10:20]])
    asked_again = {**made[7], "output": f"{text(30, 999)}。"}
    tests = write(tmp_path / "test.jsonl", [made[4], asked_again, *made[20:]])
    found = judged((AGAINST, tests), (EVAL, held), (TRAIN, train))
    assert found.tally.counts == {"duplicate-train-eval": 1, "duplicate-test-set": 2}
    assert places(found, "duplicate-train-eval") == [3]
    assert sorted(places(found, "duplicate-test-set")) == [5, 8]


def test_a_training_row_nearly_in_the_evaluation_or_a_test_set_stops(tmp_path: Path) -> None:
    made = rows(30)
    nearly = [
        {"instruction": f"{row['instruction'][:-1]}吧？", "output": f"{row['output'][:-2]}了。"}
        for row in made
    ]
    train = write(tmp_path / "train.jsonl", [*made[:10], nearly[1]])
    held = write(tmp_path / "eval.jsonl", [nearly[2], *made[10:20]])
    tests = write(tmp_path / "test.jsonl", [nearly[4], *made[20:]])
    found = judged((AGAINST, tests), (EVAL, held), (TRAIN, train))
    kinds = "near-duplicate", "near-duplicate-train-eval", "near-duplicate-test-set"
    assert found.tally.counts == dict.fromkeys(kinds, 1)
    assert [places(found, kind) for kind in kinds] == [[11], [3], [5]]
    of = {name: path for name, path in zip(kinds, (train, held, tests), strict=True)}
    for kind in kinds:
        assert found.tally.examples[kind][0]["detail"].startswith(f"nearly the same as {of[kind]}:")
    told = {each["finding"]: each for each in found.tally.findings(found.files)}
    assert [told[kind]["severity"] for kind in kinds] == ["warn", "stop", "stop"]
    assert "evaluation" in told[kinds[1]]["advice"] and "test set" in told[kinds[2]]["advice"]


def test_questions_and_answers_that_are_shared(tmp_path: Path) -> None:
    made = rows(30)
    made[5]["instruction"] = made[2]["instruction"]
    for at in (10, 11, 12):
        made[at]["output"] = "好的，我们会尽快为您处理。"
    for at in (20, 21, 22, 23):
        made[at]["output"] = "正面"  # a class, which many rows have
    found = judged((TRAIN, write(tmp_path / "a.jsonl", made)))
    assert found.tally.counts == {
        "same-question-different-answers": 1,
        "same-answer-many-questions": 3,
    }
    assert places(found, "same-question-different-answers") == [6]
    assert places(found, "same-answer-many-questions") == [11, 12, 13]


@pytest.mark.parametrize("column", ("instruction", "output"))
def test_an_empty_column_is_said_once(tmp_path: Path, column: str) -> None:
    made = [{**row, column: ""} for row in rows(20)]
    found = judged((TRAIN, write(tmp_path / "a.jsonl", made)))
    assert found.tally.counts == {"empty-column": 20}
    assert column in found.tally.examples["empty-column"][0]["detail"]


def test_a_row_with_several_bad_columns_counts_once(tmp_path: Path) -> None:
    empty = [{"instruction": "", "output": ""}] * 20
    same = [{"instruction": "请说一句话。", "output": "好的，已经完成了。"}] * 20
    for kind, made in (("empty-column", empty), ("constant-column", same)):
        found = judged((TRAIN, write(tmp_path / "a.jsonl", made)))
        told = {each["finding"]: each for each in found.tally.findings(found.files)}[kind]
        assert (told["count"], told["share"], len(told["examples"])) == (20, 1.0, 2)


def test_a_share_is_of_the_rows_of_the_sides_that_have_the_finding(tmp_path: Path) -> None:
    made = rows(60)
    for at in (3, 5, 7, 9, 33):
        made[at]["output"] += "</s>"
    for at in (11, 12):
        made[at]["output"] = ""
    train = write(tmp_path / "a.jsonl", made[:20]), write(tmp_path / "b.jsonl", made[20:30])
    held = write(tmp_path / "eval.jsonl", made[30:40])
    tests = write(tmp_path / "test.jsonl", made[40:])
    found = judged((AGAINST, tests), (EVAL, held), *((TRAIN, path) for path in train))
    shares = {each["finding"]: each["share"] for each in found.tally.findings(found.files)}
    expected = {"special-token-in-text": 5 / 40, "empty-answer": 2 / 30}
    assert shares == {kind: round(share, 6) for kind, share in expected.items()}


def test_an_empty_answer_here_and_there_is_a_row_of_its_own(tmp_path: Path) -> None:
    made = rows(20)
    made[3]["output"] = " "
    found = judged((TRAIN, write(tmp_path / "a.jsonl", made)))
    assert found.tally.counts == {"empty-answer": 1} and places(found, "empty-answer") == [4]


def test_a_constant_column_is_found_unless_it_is_the_task_of_another(tmp_path: Path) -> None:
    same = [{**row, "output": "好的，已经完成了。"} for row in rows(12)]
    found = judged((TRAIN, write(tmp_path / "a.jsonl", same)))
    assert found.tally.counts["constant-column"] == 12
    task = [
        {"instruction": "翻译成英语", "input": row["instruction"], "output": row["output"]}
        for row in rows(12)
    ]
    assert not judged((TRAIN, write(tmp_path / "b.jsonl", task))).tally.counts
    talks = [
        {"messages": [{"role": "user", "content": row["instruction"]},
                      {"role": "assistant", "content": "好的，已经完成了。"}]}
        for row in rows(12)
    ]  # fmt: skip
    found = judged((TRAIN, write(tmp_path / "c.jsonl", talks)))
    assert found.tally.counts["constant-column"] == 12


def test_swapped_columns_are_said_once_and_single_rows_by_themselves(tmp_path: Path) -> None:
    made = [{"instruction": r["output"], "output": r["instruction"]} for r in rows(20)]
    found = judged((TRAIN, write(tmp_path / "a.jsonl", made)))
    assert found.tally.counts == {"swapped-columns": 20}
    assert len(found.tally.examples["swapped-columns"]) == 1
    one = {"instruction": f"{text(40, 7777)}。", "output": "什么是光合作用？"}
    found = judged((TRAIN, write(tmp_path / "b.jsonl", [*rows(20), one])))
    assert places(found, "swapped-columns") == [21]


TASKS = {
    "label": ("判断下面评论的情感，只回答正面或负面。", lambda at: "负面" if at % 3 else "正面"),
    "bare label": ("", lambda at: "负面" if at % 3 else "正面"),
    "title": ("请为下面的文章写一个标题。", lambda at: f"如何做到{text(6, at)}"),
    "entities": ("抽取文本中的实体", lambda at: f'{{"地点": "{text(3, at)}"}}'),
    "question": ("根据下面的段落提出一个问题。", lambda at: f"{text(6, at)}是什么？"),
    "question, in English": ("Ask one question about:", lambda at: f"What is {text(6, at)}?"),
    "choice": ("请选择：A. 是 B. 否。", lambda at: "AB"[at % 2]),
    "attributes": ("从文案中提取属性。", lambda at: f"类型#{text(2, at)}*颜色#{text(2, at + 1)}"),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("own_column", (True, False))
def test_short_answers_to_long_texts_are_no_swapped_columns(
    tmp_path: Path, task: str, own_column: bool
) -> None:
    asked, answer = TASKS[task]
    made = []
    for at in range(12):
        about = f"{text(30, 2 * at)}，{text(20, 2 * at + 1)}。"
        question = {"instruction": asked, "input": about}
        if not own_column:
            question = {"instruction": f"{asked}\n{about}" if at % 2 else f"{about}\n{asked}"}
        made.append({**question, "output": answer(at)})
    counts = judged((TRAIN, write(tmp_path / "a.jsonl", made))).tally.counts
    assert "swapped-columns" not in counts


def test_lists_of_attributes_in_the_place_of_answers_are_swapped(tmp_path: Path) -> None:
    made = [
        {"content": f"{text(40, at)}。", "summary": f"类型#裙*颜色#{text(3, at)}*图案#条纹"}
        for at in range(12)
    ]
    found = judged((TRAIN, write(tmp_path / "a.jsonl", made)))
    assert found.tally.counts == {"swapped-columns": 12}
    right = [{"content": row["summary"], "summary": row["content"]} for row in made]
    assert not judged((TRAIN, write(tmp_path / "b.jsonl", right))).tally.counts


PRIVATE = {
    "13812345678": "13812345678是我的手机号，帮我写一段自我介绍，再加上我的爱好。",
    "zhang.wei88@mail-host.cn": "我的邮箱是zhang.wei88@mail-host.cn，请写一封信，说明我明天到。",
    "11010519491231002X": "证件 11010519491231002X 帮我登记一下，再说明要带哪些材料。",
    "s3cretWord99": "https://me:s3cretWord99@host.cn/a 这个地址打不开，请说明怎样处理。",
}


def test_no_kind_that_shows_a_beginning_shows_personal_data(tmp_path: Path) -> None:
    asked = [{**row, "instruction": q} for row, q in zip(rows(4), PRIVATE.values(), strict=True)]
    again = [{**row, "output": f"{text(40, at + 500)}。"} for at, row in enumerate(asked)]
    near = [{**row, "output": f"{row['output'][:-2]}了。"} for row in [*asked, *again]]
    long = [{**row, "output": f"{text(3000, at + 600)}。"} for at, row in enumerate(asked)]
    same = [
        {"instruction": f"{q}{text(9, at + 700)}", "output": "好的，我们会尽快为您处理。"}
        for at, q in enumerate(PRIVATE.values())
    ]
    held = write(tmp_path / "eval.jsonl", [*asked[:2], *rows(4, 200)])
    tests = write(tmp_path / "test.jsonl", [*asked[2:], *rows(4, 300)])
    made = [*rows(90, 20), *asked, *again, *again, *near, *long, *same]
    train = write(tmp_path / "a.jsonl", made)
    found = judged((AGAINST, tests), (EVAL, held), (TRAIN, train))
    assert found.tally.counts.keys() >= {
        "exact-duplicate", "near-duplicate", "duplicate-train-eval", "duplicate-test-set",
        "near-duplicate-train-eval", "near-duplicate-test-set",
        "same-question-different-answers", "same-answer-many-questions", "extreme-length",
        "cut-by-limit",
    }  # fmt: skip
    told = json.dumps(found.tally.examples, ensure_ascii=False)
    assert not [piece for piece in PRIVATE if piece in told or piece[3:-2] in told]
    for number in range(len(found.record_N)):
        assert not [piece for piece in PRIVATE if piece[3:8] in found.head(number)]


def test_lengths_far_from_all_others_are_extreme(tmp_path: Path) -> None:
    made = rows(40)
    made[7]["output"] = f"{text(5000, 1)}。"
    made[9]["output"] = "好"
    found = judged((TRAIN, write(tmp_path / "a.jsonl", made)))
    assert places(found, "extreme-length") == [8, 10]
    assert "5,001 characters" in found.tally.examples["extreme-length"][0]["detail"]


def test_the_option_and_the_value_that_mend_a_cut_are_named(tmp_path: Path) -> None:
    made = rows(40)
    made[3]["output"] = f"{text(900, 1)}。"
    found = judged((TRAIN, write(tmp_path / "a.jsonl", made)))
    assert found.tally.counts["cut-by-limit"] == 1 and places(found, "cut-by-limit") == [4]
    advice = found.tally.advice["cut-by-limit"]
    assert advice.startswith("set data.max_answer_tokens to 512 (now 254; cut: 2.5% at 256")


def test_limits_cut_as_encoding_cuts(full_dir: Path) -> None:
    """Under the vocabulary's own counts, against encode_row, at every limit around the edge."""
    encoding = load_encoding(full_dir)
    turns = ("一二三四五", "六七八九十" * 3)
    talk = Conversation(None, (Turn("user", turns[0]), Turn("assistant", turns[1])))
    look.start(encoding)
    try:
        made = look.check(look.TalkBatch([texts_of(talk)]))
    finally:
        look.start(None)
    numbers = made.numbers
    counts = numbers.asked_tokens_N, numbers.said_tokens_N, numbers.turns_N
    seen = set()
    for limit in range(4, 60):
        for asked in (10, 24):
            options = EncodeOptions(max_prompt_tokens=asked, max_answer_tokens=limit)
            row = encode_row(encoding, talk, options)
            data = DataOptions(max_prompt_tokens=asked, max_answer_tokens=limit)
            by = {each.option: bool(each.is_cut_N[0]) for each in cuts(data, None, *counts)}
            assert by["data.max_answer_tokens"] == row.answer_cut, limit
            assert by["data.max_prompt_tokens"] == row.prompt_cut, limit
            seen |= {(row.answer_cut, row.prompt_cut)}
    assert seen == {(False, False), (True, False), (False, True), (True, True)}


def test_an_answer_is_cut_where_the_data_set_never_ends_a_sentence() -> None:
    endings = Endings()
    endings.see(["裙摆浪漫又飘逸。行走间很优雅。", "浪花浪漫，浪费可惜。", "颜色浪漫。"] * 5)
    assert endings.is_cut("又浪") and not endings.is_cut("浪漫")
    assert not endings.is_cut("来呀")


def test_workers_find_what_one_process_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rows(60)
    made[31] = made[3]
    made[42] = {**made[42], "output": "作为一个AI语言模型，我无法回答。"}
    file = write(tmp_path / "a.jsonl", made)
    alone = judged((TRAIN, file))
    monkeypatch.setattr(examining, "BATCH_ROWS", 7)
    monkeypatch.setattr(examining, "INLINE_BATCHES", 1)
    given = []
    plain = examining.process_pool

    def patient(*args: Any) -> Any:
        from contextlib import contextmanager
        from time import sleep

        @contextmanager
        def pool() -> Any:
            with plain(*args) as submit:

                def hand(work: Any, argument: Any) -> Any:
                    while (future := submit(work, argument)) is None:
                        sleep(0.05)
                    given.append(1)
                    return future

                yield hand

        return pool()

    monkeypatch.setattr(examining, "process_pool", patient)
    together = examine([(TRAIN, file)], ReadOptions(), FindingTally(Places()), workers=1)
    judge(together, DataOptions(), None)
    assert given and together.tally.findings(together.files) == alone.tally.findings(alone.files)
    assert together.signatures is not None and alone.signatures is not None
    assert np.array_equal(together.signatures.whole_N, alone.signatures.whole_N)


def test_rows_that_share_a_line_have_their_index(tmp_path: Path) -> None:
    made = rows(5)
    made[3] = made[1]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(["no object", *made[1:]]))
    found = judged((TRAIN, str(file))).tally
    assert found.counts == {"exact-duplicate": 1, "unreadable-row": 1}
    (copy,) = found.examples["exact-duplicate"]
    assert (copy["place"], copy["detail"]) == (f"{file}:1[3]", f"the same as {file}:1[1]")
    (unread,) = found.examples["unreadable-row"]
    assert unread["place"] == f"{file}:1[0]"
    assert found.places.file_and_line(3) == (str(file), "1[3]")
    kept = Places()
    for source in ("a:1", "a:2", "a:2", "a:3"):
        kept.add(source, 0)
    kept.add("a:3", 1)
    assert [kept.text(at) for at in range(5)] == ["a:1", "a:2[0]", "a:2[1]", "a:3", "a:3"]
    assert kept.source(2) == "a:2" and kept.file_and_line(3) == ("a", 3)


def test_places_come_back_as_they_were_given() -> None:
    kept = Places()
    sources = ["a.jsonl:1", "b.parquet#7", "c.json:3 data[4]", "d.xlsx:Sheet:12", "e:007", "f", ""]
    for file, source in enumerate(sources):
        kept.add(source, file)
    assert [kept.text(record) for record in range(len(kept))] == sources
    found = [kept.file_and_line(record) for record in range(4)]
    assert found == [
        ("a.jsonl", 1), ("b.parquet", 7), ("c.json", "3 data[4]"), ("d.xlsx:Sheet", 12)
    ]  # fmt: skip
    assert kept.files().tolist() == list(range(7))
