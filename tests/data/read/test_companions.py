"""Columns beside a row's shape: what joins the conversation, what drops the row, what is said."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_ds.data.read.dialogue import Dropped, RowError, as_conversation, as_prompt
from qwen_ds.data.read.readers import find_reader

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def questions(row: dict[str, Any]) -> list[str]:
    """The system text, where there is one, and the questions of a row."""
    (outcome,) = find_reader(row).read(row)
    assert not isinstance(outcome, Dropped), outcome
    found = as_conversation(outcome)
    assert not isinstance(found, Dropped), found
    texts = [turn.text for turn in found.turns if turn.role == "user"]
    return [found.system, *texts] if found.system is not None else texts


def unread(row: dict[str, Any]) -> list[str]:
    reader = find_reader(row)
    return list(reader.not_read(row, reader.beside(row), reader.read(row)))


def dropped(row: dict[str, Any]) -> str:
    (outcome,) = find_reader(row).read(row)
    found = outcome if isinstance(outcome, Dropped) else as_conversation(outcome)
    assert isinstance(found, Dropped) and not found.unreadable
    return found.reason


QA = {"question": "q", "answer": "a"}
FORTY = "forty characters of a passage, or more of"
JOINED: list[tuple[dict[str, Any], list[str]]] = [
    ({**QA, "system_prompt": "s"}, ["s", "q"]),
    ({"messages": TURNS, "system_prompt": " s "}, ["s", "q"]),
    ({"messages": TURNS, "system_message": "s"}, ["s", "q"]),
    ({"instruction": "q", "output": "a", "sys_prompt": "s"}, ["s", "q"]),
    ({"dialogue": "<user>q<assistant>a", "system": "s"}, ["s", "q"]),
    ({**QA, "context": " c "}, ["c\nq"]),
    ({**QA, "contexts": ["c", "d"]}, ["c\nd\nq"]),
    ({**QA, "context": None, "passage": ""}, ["q"]),
    ({**QA, "text": "c"}, ["c\nq"]),
    ({"query": "q", "answer": "a", "document": "c"}, ["c\nq"]),
    ({"prompt": "p", "query": "q", "response": "a"}, ["p\tq"]),
    (
        {"prompt": "p", "query": "q", "response": "a", "history": [["h", "i"]], "system": "s"},
        ["s", "h", "p\tq"],
    ),
    ({"prompt": "p", "input": "q", "output": "a"}, ["p\tq"]),
    ({"query": "p", "input": "q", "output": "a"}, ["p\tq"]),
    ({"question": "p", "input": "q", "output": "a"}, ["p\tq"]),
    ({"prompt": "", "query": "q", "response": "a"}, ["q"]),
    ({"instruction": "i", "context": "c", "output": "a"}, ["i\tc"]),
    ({"instruction": "i", "context": "c", "response": "a"}, ["i\tc"]),
    ({"instruction": "i", "context": "", "response": "a"}, ["i"]),
    ({"instruction": "i", "question": "q", "answer": "a"}, ["i\tq"]),
    ({"instruction": "i", "query": "q", "response": "a"}, ["i\tq"]),
    ({"instruction": "i", "content": "c", "summary": "a"}, ["i\tc"]),
    ({"prompt": "p", "content": "c", "response": "a"}, ["p\tc"]),
    ({"prompt": "p", "content": "c", "summary": "a"}, ["p\tc"]),
    ({"title": "t", "content": "c", "summary": "a"}, ["t\nc"]),
    ({"context": FORTY, "prompt": f"{FORTY} q", "response": "a"}, [f"{FORTY} q"]),
    ({**QA, "A": "x", "B": "y"}, ["q\nA. x\nB. y"]),
    ({**QA, "A": "x", "B": "y", "C": 3, "D": ""}, ["q\nA. x\nB. y\nC. 3"]),
    ({**QA, "opa": "x", "opb": "y"}, ["q\nA. x\nB. y"]),
    ({**QA, "option_a": "x", "option_b": "y"}, ["q\nA. x\nB. y"]),
    ({**QA, "options": ["x", "y"]}, ["q\nA. x\nB. y"]),
    ({**QA, "options": ["A) x", "B) y"]}, ["q\nA) x\nB) y"]),
    ({**QA, "options": {"A": "x", "B": "y"}}, ["q\nA. x\nB. y"]),
    ({**QA, "choices": {"text": ["x", "y"], "label": ["1", "2"]}}, ["q\n1. x\n2. y"]),
    ({**QA, "context": "c", "A": "x", "B": "y"}, ["c\nq\nA. x\nB. y"]),
]


@pytest.mark.parametrize(("row", "expected"), JOINED, ids=[" ".join(row) for row, _ in JOINED])
def test_known_columns_become_part_of_the_conversation(
    row: dict[str, Any], expected: list[str]
) -> None:
    assert questions(row) == expected
    assert unread(row) == []


@pytest.mark.parametrize("key", ["output", "response", "answer", "chosen", "completion"])
def test_an_instruction_is_answered_under_many_names(key: str) -> None:
    assert questions({"instruction": "i", key: "a"}) == ["i"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({**QA, "id": 7, "source": "web", "lang": None, "tags": []}, ["id", "source"]),
        ({**QA, "zero": 0, "off": False}, ["zero", "off"]),
        ({**QA, "response": "other"}, ["response"]),
        ({**QA, "response": "a"}, []),
        ({**QA, "text": "### Human: q ### Assistant: a"}, ["text"]),
        ({**QA, "A": "vitamin"}, ["A"]),
        ({**QA, "title": "t"}, ["title"]),
        ({**QA, "label": 3, "loss": 0.53, "weight": 0.3}, ["label", "loss", "weight"]),
        ({**QA, "images": ["cat.jpg"]}, []),
        ({**QA, "label": True, "tools": "[]", "images": [None], "video": False}, ["label"]),
        ({**QA, "image": "False", "video": "NaN", "audio": "n/a", "tools": "{}"}, []),
        ({**QA, "image": float("nan"), "img": "无", "tools": {}, "videos": '["None"]'}, []),
        ({"instruction": "i", "output": "a", "label": False}, ["label"]),
        ({**QA, "context": {"title": "t"}, "documents": [{"t": 1}]}, ["context", "documents"]),
        ({**QA, "article": False, "knowledge": 7}, ["article", "knowledge"]),
        ({**QA, "A": "x", "B": True}, ["A", "B"]),
        ({**QA, "options": 4}, ["options"]),
        ({"instruction": "i", "chosen": "a", "rejected": "b"}, ["rejected"]),
        ({"instruction": "i", "input": "", "output": "a", "text": "i a"}, ["text"]),
        ({"messages": TURNS, "prompt": "q", "chosen_score": 9.5}, ["prompt", "chosen_score"]),
        ({"question": "q", "chatgpt_answers": ["a"], "human_answers": ["b"]}, ["human_answers"]),
        ({"textbox_question": "q", "textbox_answer": "A", "textbox_answer_analysis": "为甲"},
         ["textbox_answer"]),
        ({"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "r", "name": "n"}]},
         ["messages[].reasoning_content", "messages[].name"]),
        ({"messages": [{**TURNS[0], "train": True}, {**TURNS[1], "train": True}]},
         ["messages[].train"]),
        ({"conversations": [{"role": "system", "content": "s"}, *TURNS], "system": "t"},
         ["system"]),
    ],
)  # fmt: skip
def test_what_holds_something_and_is_not_read_is_named(
    row: dict[str, Any], expected: list[str]
) -> None:
    assert unread(row) == expected


IMAGES, TOOLS, BAD = "images are not read", "tool turns", "answers marked as bad are not learnt"
MASKED = "rows marked as not to be learnt"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": TURNS, "images": ["cat.jpg"]}, IMAGES),
        ({"messages": TURNS, "images": '["cat.jpg"]'}, IMAGES),
        ({**QA, "image": "cat.jpg"}, IMAGES),
        ({**QA, "image": {"bytes": None, "path": "cat.jpg"}}, IMAGES),
        ({"messages": TURNS, "videos": ["x.mp4"]}, "videos are not read"),
        ({"messages": TURNS, "audio_path": "x.wav"}, "audios are not read"),
        ({"messages": [{**TURNS[0], "images": ["cat.jpg"]}, TURNS[1]]}, IMAGES),
        ({"question": "<image>这是什么", "answer": "a"}, IMAGES),
        ({"question": "第一张：<image 1>，哪只？", "answer": "a"}, IMAGES),
        ({"question": "Picture 1: <img>cat.jpg</img>\nq", "answer": "a"}, IMAGES),
        ({"question": "<|image_pad|>q", "answer": "a"}, IMAGES),
        ({"question": "<video>\nq", "answer": "a"}, "videos are not read"),
        ({"question": "<audio>x.wav</audio>q", "answer": "a"}, "audios are not read"),
        ({"messages": TURNS, "tools": [{"name": "f"}]}, TOOLS),
        ({"messages": TURNS, "tools": '[{"name": "f"}]'}, TOOLS),
        ({"messages": TURNS, "functions": "f(x)"}, TOOLS),
        ({"messages": TURNS, "label": False}, BAD),
        ({"messages": TURNS, "kto_tag": "False"}, BAD),
        ({"messages": TURNS, "kto_tag": 0}, BAD),
        ({"prompt": "q", "completion": "a", "label": 0}, BAD),
        ({"messages": TURNS, "loss": False}, MASKED),
        ({**QA, "train": False}, MASKED),
        ({**QA, "weight": 0}, MASKED),
    ],
)
def test_a_column_that_changes_the_meaning_drops_the_row(row: dict[str, Any], reason: str) -> None:
    assert dropped(row) == reason


@pytest.mark.parametrize(
    "text",
    ["How do I use the <video> tag?", "<video>x</video>", "<rss><image><url>u</url></image></rss>",
     "<img src='cat.jpg'>", "the <image> tag", "a < b and <images>", "<audio controls>"],
)  # fmt: skip
def test_html_refers_to_nothing(text: str) -> None:
    assert questions({"question": text, "answer": "a"}) == [text]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": TURNS[1]},
        {"conversations": [*TURNS, TURNS[0]], "chosen": TURNS[1], "rejected": TURNS[1]},
        {"messages": TURNS, "chosen": "a", "rejected": "b", "images": ["cat.jpg"]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"chosen": TURNS, "rejected": TURNS},
        {"messages": None, "chosen": TURNS, "rejected": TURNS},
    ],
)
def test_rows_of_preference_data_are_told_by_their_keys_all_alike(row: dict[str, Any]) -> None:
    with pytest.raises(RowError, match="preference data: chosen is not read") as error:
        find_reader(row).read(row)
    assert error.value.reason == "preference data"


def test_a_rejected_answer_beside_turns_is_preference_data_too() -> None:
    row = {"messages": TURNS, "rejected_response": "b"}
    with pytest.raises(RowError, match="preference data: rejected_response is not read"):
        find_reader(row).read(row)
    assert questions({"messages": TURNS, "chosen": None, "rejected": None}) == ["q"]


def test_for_a_prompt_only_what_the_question_lacks_matters() -> None:
    def prompt(row: dict[str, Any]) -> tuple[object, object]:
        (outcome,) = find_reader(row, True).read(row, for_prompts=True)
        return (outcome, None) if isinstance(outcome, Dropped) else as_prompt(outcome)

    asked = {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": TURNS[1]}
    assert not isinstance(prompt(asked)[0], Dropped)
    reader = find_reader(asked, True)
    assert reader.not_read(asked, reader.beside(asked)) == ["chosen", "rejected"]
    # A bad answer is nothing to compare with.
    assert prompt({"messages": TURNS, "label": True})[1] == "a"
    assert prompt({"messages": TURNS, "label": False})[1] is None
    for key in ("images", "tools"):
        assert isinstance(prompt({"messages": TURNS, key: ["x"]})[0], Dropped)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": 5, "query": "q", "response": "a"}, "prompt is a number; expected text"),
        ({**QA, "system_prompt": 5}, "system_prompt is a number; expected text"),
        ({**QA, "question": float("nan")}, "question is NaN; expected text"),
        ({"messages": TURNS, "kto_tag": "maybe"}, "kto_tag is 'maybe'; expected true or false"),
    ],
)
def test_a_known_column_of_another_type_is_an_error(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(RowError, match=fault):
        find_reader(row).read(row)
