"""Rows whose keys, types or marks are not the plain ones: nothing is lost in silence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen_ds.model.tokenizer import load_encoding
from tests.adversarial.harness import Member, Place, check

Q, A = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}
TALK = {"messages": [Q, A]}
SHARE = [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "say"}]
QA = {"question": "ask", "answer": "say"}
PAIR = {"instruction": "ask", "output": "say"}
GOOD = {"messages": [{**Q, "content": "other"}, {**A, "content": "well"}]}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}


def after(**marks: Any) -> dict[str, Any]:
    """A conversation of two pairs, whose first answer has further keys."""
    return {"messages": [Q, {**A, **marks}, {**Q, "content": "more"}, {**A, "content": "end"}]}


# name: (row, its texts in brackets where they are learnt, what is said of it)
TAKEN: dict[str, tuple[Any, str, str]] = {
    "system_prompt": ({**QA, "system_prompt": "sys", "id": 1}, "sys|ask|[say]", "not read: id (1"),
    "system_prompt beside turns": ({**TALK, "system_prompt": "sys"}, "sys|ask|[say]", ""),
    "system_message": ({**TALK, "system_message": "sys"}, "sys|ask|[say]", ""),
    "two system texts": (
        {**TALK, "system": "sys", "system_prompt": "two"}, "sys|ask|[say]", "not read: system_pr"),
    "context": ({**QA, "context": "ctx"}, "|ctx\nask|[say]", ""),
    "context of an object": ({**QA, "context": {"x": 1}}, "|ask|[say]", "not read: context (1"),
    "options of a number": ({**QA, "options": 4}, "|ask|[say]", "not read: options (1 row)"),
    "contexts": ({**QA, "contexts": ["ctx", "two"]}, "|ctx\ntwo\nask|[say]", ""),
    "passage": ({"query": "ask", "answer": "say", "passage": "ctx"}, "|ctx\nask|[say]", ""),
    "text beside a question": ({**QA, "text": "ctx"}, "|ctx\nask|[say]", ""),
    "text that repeats the row": ({**QA, "text": "ask say"}, "|ask|[say]", "not read: text"),
    "alpaca's own text": (
        {**PAIR, "input": "", "text": "Below is: ask say"}, "|ask|[say]", "not read: text"),
    "dolly": (
        {"instruction": "ask", "context": "ctx", "response": "say", "category": "x"},
        "|ask\tctx|[say]", "not read: category (1 row)"),
    "dolly without context": (
        {"instruction": "ask", "context": "", "response": "say"}, "|ask|[say]", ""),
    "instruction, context, output": ({**PAIR, "context": "ctx"}, "|ask\tctx|[say]", ""),
    "instruction, answer": ({"instruction": "ask", "answer": "say"}, "|ask|[say]", ""),
    "instruction, chosen": (
        {"instruction": "ask", "chosen": "say", "rejected": "no"}, "|ask|[say]", "read: rejected"),
    "instruction, question": ({"instruction": "do", **QA}, "|do\task|[say]", ""),
    "prompt, query": ({"prompt": "do", "query": "ask", "response": "say"}, "|do\task|[say]", ""),
    "prompt, query, history": (
        {"prompt": "do", "query": "ask", "response": "say", "history": [["h", "i"]]},
        "|h|[i]|do\task|[say]", ""),
    "prompt, input": ({"prompt": "do", "input": "ask", "output": "say"}, "|do\task|[say]", ""),
    "query, input": ({"query": "do", "input": "ask", "output": "say"}, "|do\task|[say]", ""),
    "title": ({"title": "top", "content": "ask", "summary": "say"}, "|top\nask|[say]", ""),
    "options": ({**QA, "A": "x", "B": "y"}, "|ask\nA. x\nB. y|[say]", ""),
    "list of options": ({**QA, "options": ["x", "y"]}, "|ask\nA. x\nB. y|[say]", ""),
    "medmcqa": ({**QA, "opa": "x", "opb": "y", "cop": 0}, "|ask\nA. x\nB. y|[say]", "not read: c"),
    "joined as they are": (
        {"instruction": "ask ", "input": "\nx ", "output": "say"}, "|ask \t\nx|[say]", ""),
    "nothing beside": ({**QA, "id": None, "tags": [], "meta": {}}, "|ask|[say]", ""),
    "second answer": ({**QA, "response": "no"}, "|ask|[say]", "not read: response (1 row)"),
    "first answer null": ({"question": "ask", "answer": None, "response": "say"}, "|ask|[say]", ""),
    "classes": ({**QA, "label": 3}, "|ask|[say]", "not read: label (1 row)"),
    "KTO's good answer": ({**TALK, "label": True}, "|ask|[say]", ""),
    "empty media and tools": (
        {**TALK, "images": [], "videos": None, "tools": "[]"}, "|ask|[say]", ""),
    "HTML": ({**QA, "question": "the <video> tag"}, "|the <video> tag|[say]", ""),
    "reasoning": (
        {"messages": [Q, {**A, "reasoning_content": "hm"}]}, "|ask|[say]",
        "not read: messages[].reasoning_content (1 row)"),
    "keys of turns": (
        {"conversations": [{**turn, "name": "n"} for turn in SHARE]}, "|ask|[say]",
        "not read: conversations[].name (1 row)"),
    "a question to learn": (
        {"messages": [{**Q, "train": True}, A]}, "|ask|[say]", "not read: messages[].train"),
    "weight 0": (after(weight=0), "|ask|say|more|[end]", ""),
    "weight 0.0": (after(weight=0.0), "|ask|say|more|[end]", ""),
    "weight 1": (after(weight=1), "|ask|[say]|more|[end]", ""),
    "weight null": (after(weight=None), "|ask|[say]|more|[end]", ""),
    "loss false": (after(loss=False), "|ask|say|more|[end]", ""),
    "train false": (after(train=False), "|ask|say|more|[end]", ""),
    "train 0": (after(train=0), "|ask|say|more|[end]", ""),
    "loss 1.0": (after(loss=1.0), "|ask|[say]|more|[end]", ""),
    "loss_scale 0.5": (
        after(loss_scale=0.5), "|ask|[say]|more|[end]", "not read: messages[].loss_scale (1 row)"),
    "developer": (
        {"messages": [{"role": "developer", "content": "sys"}, Q, A]}, "sys|ask|[say]", ""),
    "names in Chinese": (
        {"conversations": [{"from": "系统", "value": "sys"}, {"from": "用户", "value": "ask"},
                           {"from": "助手", "value": "say"}]},
        "sys|ask|[say]", ""),
    "upper-case names": (
        {"conversations": [{"from": "USER", "value": "ask"}, {"from": "chatgpt", "value": "say"}]},
        "|ask|[say]", ""),
    "an HTML image": ({**QA, "question": "the <image> tag"}, "|the <image> tag|[say]", ""),
    "loss_scale 0": (after(loss_scale=0), "|ask|say|more|[end]", ""),
    "loss_mask": ({**after(), "loss_mask": [0, 0, 0, 1]}, "|ask|say|more|[end]", ""),
    "NeMo's mask": ({"conversations": SHARE, "mask": "User"}, "|ask|[say]", ""),
    "a masked pair": (
        {"conversation": [{"human": "ask", "assistant": "say", "loss": False},
                          {"human": "more", "assistant": "end"}]},
        "|ask|say|more|[end]", ""),
    "TRL's messages": ({"prompt": [Q], "completion": [A], "id": 1}, "|ask|[say]", "not read: id"),
    "TRL's messages and a tag": (
        {"prompt": [Q], "completion": [A], "label": True}, "|ask|[say]", ""),
    "prompt of turns, answer of text": (
        {"prompt": [{**Q, "role": "system"}, Q], "response": "say"}, "ask|ask|[say]", ""),
    "keys of TRL's turns": (
        {"prompt": [Q], "completion": [{**A, "name": "n"}]}, "|ask|[say]",
        "not read: completion[].name (1 row)"),
    "TRL's weights": (
        {"prompt": [Q, {**A, "weight": 0}, Q], "completion": [A]}, "|ask|say|ask|[say]", ""),
    "history of no text": ({**PAIR, "history": "[]"}, "|ask|[say]", ""),
    "history as JSON": ({**PAIR, "history": '[["h", "i"]]'}, "|h|[i]|ask|[say]", ""),
    "messages as JSON": ({"messages": json.dumps([Q, A])}, "|ask|[say]", ""),
    "keys of turns in JSON": (
        {"messages": json.dumps([Q, {**A, "name": "n"}])}, "|ask|[say]", "messages[].name (1 row)"),
    "conversations as JSON": ({"conversations": json.dumps(SHARE)}, "|ask|[say]", ""),
    "turns without a key": ([Q, A], "|ask|[say]", ""),
    "ShareGPT's turns without a key": (SHARE, "|ask|[say]", ""),
    "an emoji": ({**QA, "answer": "\U0001f600"}, "|ask|[\U0001f600]", ""),
    "parts": (
        {"messages": [{**Q, "content": [{"type": "text", "text": "ask"}]}, A]}, "|ask|[say]", ""),
}  # fmt: skip

# name: (row that gives nothing beside GOOD, the line that counts it)
COUNTED: dict[str, tuple[Any, str]] = {
    "images": ({"messages": [{**Q, "content": "<image>ask"}, A], "images": ["x"]}, "images are"),
    "images elsewhere": ({**TALK, "images": ["cat.jpg"]}, "1 dropped: images are not read"),
    "image": ({**PAIR, "image": "cat.jpg"}, "1 dropped: images are not read"),
    "<image>": ({**QA, "question": "see <image>\nask"}, "1 dropped: images are not read"),
    "<img>": ({**QA, "question": "<img>cat.jpg</img>ask"}, "1 dropped: images are not read"),
    "<video>": ({**QA, "question": "<video>\nask"}, "1 dropped: videos are not read"),
    "audios": ({**TALK, "audios": ["x.wav"]}, "1 dropped: audios are not read"),
    "part of an image": (
        {"messages": [{**Q, "content": [{"type": "image"}]}, A]},
        "dropped: content is not text",
    ),
    "tools": ({**TALK, "tools": [{"name": "f"}]}, "1 dropped: tool turns"),
    "tools as JSON": ({"conversations": SHARE, "tools": '[{"name": "f"}]'}, "dropped: tool turns"),
    "tool calls": ({"messages": [Q, CALL]}, "1 dropped: tool turns"),
    "label false": ({**TALK, "label": False}, "1 dropped: answers marked as bad are not learnt"),
    "kto_tag false": ({**TALK, "kto_tag": "false"}, "1 dropped: answers marked as bad"),
    "TRL's label": ({"prompt": "ask", "completion": "no", "label": False}, "answers marked as bad"),
    "loss false": ({**TALK, "loss": False}, "1 dropped: rows marked as not to be learnt"),
    "half an emoji": ({**QA, "answer": "so \ud83d"}, "1 dropped: half a character in the text"),
    "half a system text": ({**TALK, "system": "\ude00"}, "1 dropped: half a character in the text"),
    "TRL's label and messages": (
        {"prompt": [Q], "completion": [A], "label": False},
        "answers marked as bad",
    ),
    "no turn to learn": ({"messages": [Q, {**A, "weight": 0}]}, "1 dropped: nothing to learn"),
}

# name: (row, what the error says)
REFUSED: dict[str, tuple[Any, str]] = {
    "turns and chosen": (
        {"conversations": SHARE[:1], "chosen": SHARE[1], "rejected": SHARE[1]},
        "preference data: chosen is not read"),
    "whole turns and chosen": (
        {"conversations": [*SHARE, *SHARE], "chosen": SHARE[1], "rejected": SHARE[1]},
        "preference data: chosen is not read"),
    "prompt and chosen": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference data: ch"),
    "chosen alone": ({"chosen": [Q, A], "rejected": [Q, A]}, "preference data: chosen is not"),
    "rejected_response": ({**TALK, "rejected_response": "no"}, "rejected_response is not read"),
    "instances": (
        {"instruction": "ask", "instances": [{"input": "", "output": "say"}]},
        "instances[].output is not read"),
    "SQuAD": ({"question": "q", "answers": {"text": ["a"]}}, "answers.text is not read"),
    "a part's value": (
        {"messages": [{**Q, "content": [{"type": "text", "value": "hi"}]}, A]},
        "a part has `value`; expected `text`"),
    "no second text": ({"messages": [Q, {**A, "content": ""}]}, "turn 2 has no text"),
    "no text after the system's": (
        {"messages": [{"role": "system", "content": "s"}, Q, {**A, "content": " "}]},
        "turn 3 has no text"),
    "a question alone": ({"messages": [Q]}, "turn 1, a question, is the last"),
    "no question": ({"messages": [{**Q, "content": None}, A]}, "turn 1 has no text"),
    "no turns": ({"messages": []}, "messages is empty"),
    "two questions": ({"messages": [Q, Q, A]}, "turn 2 is the user's; expected the assistant's"),
    "no marks": ({"dialogue": "hello"}, "dialogue holds no turns"),
    "weight 0.5": (after(weight=0.5), "messages[1].weight is 0.5; expected 0 or 1"),
    "weight as text": (after(weight="0"), "messages[1].weight is '0'; expected 0 or 1"),
    "weight false": (after(weight=False), "messages[1].weight is False; expected 0 or 1"),
    "loss as text": (after(loss="false"), "messages[1].loss is 'false'; expected true or false"),
    "train 2": (after(train=2), "messages[1].train is 2; expected true or false"),
    "loss -1": (after(loss=-1), "messages[1].loss is -1; expected true or false"),
    "train_detail": (after(train_detail=[{"begin": 0}]), "messages[1].train_detail is"),
    "a short mask": ({**TALK, "loss_mask": [1, 0, 1]}, "loss_mask has 3 entries; expected 2"),
    "a mask of texts": ({**TALK, "loss_mask": ["a", "b"]}, "loss_mask[0] is 'a'; expected 0 or 1"),
    "a mask of the answers": ({"conversations": SHARE, "mask": "gpt"}, "mask is 'gpt'; expected"),
    "kto_tag maybe": ({**TALK, "kto_tag": "maybe"}, "kto_tag is 'maybe'; expected true or false"),
    "messages as Python": ({"messages": str([Q, A])}, "expected a list, or the JSON of one"),
    "messages of a text": ({"messages": "ask"}, "messages is 'ask'; expected a list, or the JSON"),
    "deep history": ({**PAIR, "history": "[" * 100_000}, "history is '[[["),
    "history with a key twice": (
        {"messages": '[{"role": "user", "content": "a", "content": "b"}]'}, "messages is '["),
    "prompt of texts": ({"prompt": ["ask"], "completion": "say"}, "prompt[0] is text; expected an"),
    "NaN": ({**QA, "answer": float("nan")}, "no answer"),
    "number": ({**QA, "answer": 2}, "answer is a number; expected text"),
    "system of a list": ({**TALK, "system_prompt": ["s"]}, "system_prompt is a list; expected"),
}  # fmt: skip


def encode(place: Place, *rows: Any, learn_on: str = "answer") -> Sequence[str | Path]:
    return [
        "data", "encode", "--model.path", place.base(), "--data.train", place.rows(*rows),
        "--data.learn_on", learn_on, "--data.max_tokens", "400",
        "--data.cache_dir", place.out / "cache", "--output", place.out / "rows.jsonl",
    ]  # fmt: skip


def texts(place: Place) -> str:
    """The texts of the first row: the system's unless it is the default, then all turns."""
    enc = load_encoding(place.here / "base")
    row = json.loads((place.out / "rows.jsonl").read_text().splitlines()[0])
    found, ids, labels = [], row["input_ids"], row["labels"]
    starts = [i for i, token in enumerate(ids) if token == enc.im_start_id]
    for start in starts:
        end = ids.index(enc.im_end_id, start)
        header = enc.decode(ids[start + 1 : end]).split("\n", 1)[0] + "\n"
        text = enc.decode(ids[start + 1 : end]).removeprefix(header)
        found.append(f"[{text}]" if labels[end] != -100 else text)
    default = "You are a helpful assistant."
    return "|".join(["" if found[0] == default else found[0], *found[1:]])


@pytest.mark.parametrize("name", TAKEN)
def test_a_row_is_read_with_all_that_belongs_to_it(
    name: str, tmp_path: Path, small_dir: Path
) -> None:
    row, expected, said = TAKEN[name]
    member = Member(
        name,
        lambda place: encode(place, row, GOOD),
        code=0,
        says=("2 rows of 2 read", *([said] if said else [])),
        leaves=lambda place: texts(place) == expected,
    )
    check(member, tmp_path, small_dir)
    if not said:
        assert "not read" not in (tmp_path / "stderr").read_text()


@pytest.mark.parametrize("learn_on", ["original", "official"])
def test_a_turn_not_to_be_learnt_has_no_target_however_rows_are_learnt(
    learn_on: str, tmp_path: Path, small_dir: Path
) -> None:
    member = Member(
        learn_on,
        lambda place: encode(place, after(weight=0), GOOD, learn_on=learn_on),
        code=0,
        leaves=lambda place: "|say|" in texts(place) and texts(place).endswith("[end]"),
    )
    check(member, tmp_path, small_dir)


@pytest.mark.parametrize("name", COUNTED)
def test_a_row_that_would_mean_something_else_is_counted(
    name: str, tmp_path: Path, small_dir: Path
) -> None:
    row, line = COUNTED[name]
    says = ("1 rows of 2 read", line, "(first ", "rows.jsonl:2)")
    check(Member(name, lambda place: encode(place, GOOD, row), 0, says), tmp_path, small_dir)


@pytest.mark.parametrize("name", REFUSED)
def test_an_error_names_what_is_wrong(name: str, tmp_path: Path, small_dir: Path) -> None:
    row, fault = REFUSED[name]
    member = Member(name, lambda place: encode(place, row), 2, ("rows.jsonl", fault))
    check(member, tmp_path, small_dir)
    if "messages" in row:
        assert "keys expected: messages" not in (tmp_path / "stderr").read_text()


def ask(place: Place, *rows: Any, columns: str | None = None) -> Sequence[str | Path]:
    mapped = ["--columns", columns] if columns else []
    return [
        "predict", "--model", place.base(), "--input", place.rows(*rows), "--device", "cpu",
        "--max_new_tokens", "2", "--output", place.out / "answers.jsonl", *mapped,
    ]  # fmt: skip


def prompt(place: Place) -> str:
    answers = (place.out / "answers.jsonl").read_text().splitlines()
    return str(json.loads(answers[0])["prompt"])


ASKED: dict[str, tuple[Any, str, str]] = {
    "context": (
        {"context": "ctx", "question": "ask", "mark": 4}, "ctx\nask", "not read: mark (1 row)"),
    "prompt of turns": ({"prompt": [Q]}, "ask", ""),
    "turns without a key": ([Q], "ask", ""),
    "options": ({"question": "ask", "A": "x", "B": "y"}, "ask\nA. x\nB. y", ""),
    "prompt, query": ({"prompt": "do", "query": "ask"}, "do\task", ""),
    "preference data": (
        {"conversations": SHARE[:1], "chosen": SHARE[1], "rejected": SHARE[1]},
        "ask", "not read: chosen, rejected (1 row)"),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_a_prompt_is_read_as_a_row_is(name: str, tmp_path: Path, small_dir: Path) -> None:
    row, expected, said = ASKED[name]
    member = Member(
        name,
        lambda place: ask(place, row),
        0,
        (said,) if said else (),
        leaves=lambda place: prompt(place) == expected,
    )
    check(member, tmp_path, small_dir)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({**TALK, "images": ["cat.jpg"]}, "images are not read; expected a question of text alone"),
        ({"messages": [Q], "tools": [{"name": "f"}]}, "tool turns; expected a question of text"),
        ({"prompt": "ask", "query": 5}, "query is a number; expected text"),
        (
            {"prompt": "so \ud83d"},
            "half a character in the text; expected a question of text alone",
        ),
    ],
)
def test_a_prompt_that_lacks_something_is_refused(
    row: Any, fault: str, tmp_path: Path, small_dir: Path
) -> None:
    check(Member("prompt", lambda place: ask(place, row), 2, (fault,)), tmp_path, small_dir)


def test_columns_read_what_they_name_and_the_rest_is_said(tmp_path: Path, small_dir: Path) -> None:
    row = {**TALK, "chosen": "a", "rejected": "b"}
    columns = ["--data.columns", '{"messages": "messages"}']
    says = ("not read: chosen, rejected (1 row)",)
    member = Member("columns", lambda place: [*encode(place, row, GOOD), *columns], 0, says)
    check(member, tmp_path, small_dir)
