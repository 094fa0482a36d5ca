"""Readers of one text that marks divide into turns: BELLE, Guanaco, RefGPT, MOSS, ShareGPT-cn.

The turns are stripped. A mark counts only where its data set puts it (at the start of a line,
anywhere, or only after the closing mark of the turn before), because texts also mention marks.
"""

from __future__ import annotations

import re

from qwen_ds.data.read.dialogue import (
    NO_TURNS,
    Dialogue,
    Dropped,
    Outcome,
    Row,
    RowError,
    dialogue_of,
    object_of,
    system_of,
    text_of,
)
from qwen_ds.data.read.readers_turns import read_turns

# BELLE's and Guanaco's marks open a line. Guanaco's files spell Assistant in four ways, with both
# kinds of colon.
_BELLE = re.compile(r"^(?:(?P<user>Human)|(?P<assistant>Assistant))[:：]", re.MULTILINE)
_GUANACO = re.compile(
    r"^(?:(?P<user>User)|(?P<assistant>Assistant|Asssistent|Assistent|Assistenz)|(?P<system>System))"
    "[:：]",
    re.MULTILINE,
)
_REFGPT = re.compile(r"(?P<user><user>)|(?P<assistant><assistant>)")
_SHAREGPT_CN = re.compile(r"(?P<user><\|user\|>[:：])|(?P<assistant><\|bot\|>[:：])")
# MOSS 002 opens a turn only right after the closing mark of the turn before.
_MOSS_002 = re.compile(r"(?P<user>(?:\A|<eoa>)\s*\[Human\]:)|(?P<assistant><eoh>\s*\[MOSS\]:)")
_MOSS_002_END = re.compile(r"<eo[ah]>\s*\Z")

_TURN = re.compile(r"turn_(\d+)")
_MOSS_HUMAN = re.compile(r"\A\s*<\|Human\|>:|(?:<eoh>)\s*\Z")
_MOSS_ANSWER = re.compile(r"\A\s*<\|MOSS\|>:|(?:<eor>\s*)?<eom>\s*\Z|<eor>\s*\Z")
_MOSS_COMMANDS = re.compile(r"\A\s*<\|Commands\|>:|<eoc>\s*\Z")
_CITATION = re.compile(r"<sup>(?:(?!</?sup>).)*</sup>", re.DOTALL)
_NUMBERED_CITATION = re.compile(r"<sup>[^<]*(?:<\|\d+\|>[^<]*)+</sup>")
_NUMBER = re.compile(r"<\|\d+\|>")


def split_at_marks(text: str, marks: re.Pattern[str]) -> list[tuple[str, str]]:
    """(role, stripped text) of each mark, whose group name is the role; text before the first mark
    is left out."""
    found = list(marks.finditer(text))
    ends = [*(mark.start() for mark in found[1:]), len(text)]
    return [
        (str(mark.lastgroup), text[mark.end() : end].strip())
        for mark, end in zip(found, ends, strict=False)
    ]


def dialogue_in_instruction(instruction: str, extra: str, answer: str) -> Outcome | None:
    """The dialogue that BELLE (`Human:`) or Guanaco (`User:`) wrote into alpaca columns, if any.

    The text must open with a mark: one that only quotes a dialogue further down is an ordinary
    instruction, and so is a marked instruction with an unmarked input.
    """
    if not (
        "Human" in instruction or "User" in instruction or "User" in extra or "System" in extra
    ):
        return None
    history, question = instruction.strip(), extra.strip()
    if _BELLE.match(history) and not question:
        segments = split_at_marks(history, _BELLE)
    elif (not history or _opens_guanaco(history)) and (not question or _opens_guanaco(question)):
        segments = split_at_marks(history, _GUANACO) + split_at_marks(question, _GUANACO)
    else:
        return None
    if segments and segments[-1] == ("assistant", ""):
        segments.pop()  # the place where the answer goes, not a turn
    systems = [text for role, text in segments if role == "system"]
    turns = [segment for segment in segments if segment[0] != "system"]
    if not turns:
        return None  # an instruction that merely opens with "System:"
    found = dialogue_of([*turns, ("assistant", answer)], "".join(systems) or None)
    if isinstance(found, Dropped) or len(systems) > 1:
        return Dropped("history is not question and answer pairs")
    return found


def read_refgpt(row: Row) -> list[Outcome]:
    """RefGPT: `<user>` and `<assistant>` cut the text; in its first edition BELLE's marks do."""
    text = text_of(row, "dialogue").strip()
    turns = split_at_marks(text, _REFGPT) or split_at_marks(text, _BELLE)
    return [dialogue_of(turns, None)]


def read_sharegpt_translation(row: Row) -> list[Outcome]:
    """ShareGPT-cn as first published: one object a file, the dialogue in `translation`."""
    turns = split_at_marks(text_of(row, "translation"), _SHAREGPT_CN)
    return [dialogue_of(turns, None)]


def read_moss_002(row: Row) -> list[Outcome]:
    """MOSS 002: `prefix` is the system text, `plain_text` the dialogue."""
    text = _MOSS_002_END.sub("", text_of(row, "plain_text"))
    return [dialogue_of(split_at_marks(text, _MOSS_002), system_of(row, "prefix"))]


def read_moss_003(row: Row) -> list[Outcome]:
    """MOSS 003: questions and answers of turn_1, turn_2 .. in number order.

    Thoughts, commands and results of plugins are left out, and so are the citations of them,
    `<sup>..</sup>` and `<|n|>`. In a row without commands a `<sup>` without such a number is an
    exponent, and stays.
    """
    chat = row.get("chat")
    if isinstance(chat, list):
        return read_turns("chat")(row)  # somebody else's list of messages under MOSS's key
    if chat is None:
        return [Dropped(NO_TURNS)]
    chat = object_of(chat, "chat")
    numbered = sorted((int(found[1]), key) for key in chat if (found := _TURN.fullmatch(key)))
    if chat and not numbered:
        keys = ", ".join(map(str, chat))
        raise RowError("missing key", f"chat has the keys {keys}; expected turn_1, turn_2 ..")
    turns = [object_of(chat[key], f"chat.{key}") for _, key in numbered if chat[key] is not None]
    commands = (_MOSS_COMMANDS.sub("", text_of(turn, "Commands")).strip() for turn in turns)
    has_tools = any(command not in ("", "None") for command in commands)
    citation = _CITATION if has_tools else _NUMBERED_CITATION
    pairs = []
    for turn in turns:
        question = _MOSS_HUMAN.sub("", text_of(turn, "Human")).strip()
        answer = _MOSS_ANSWER.sub("", text_of(turn, "MOSS"))
        pairs.append((question, _NUMBER.sub("", citation.sub("", answer)).strip()))
    return [Dialogue(system_of(row, "meta_instruction"), tuple(pairs))]


def _opens_guanaco(text: str) -> bool:
    mark = _GUANACO.match(text)
    return mark is not None and mark.lastgroup != "assistant"
