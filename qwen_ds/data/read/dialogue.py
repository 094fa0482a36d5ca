"""The dialogue of a source row, which is the result of every reader: question and answer pairs.

A reader does not know whether a row is trained on or answered. `as_conversation` and `as_prompt`
hold the rules for missing halves, so that training and prediction read every format alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TypeVar

from qwen_ds.data.read.files_json import parsed
from qwen_ds.model.chatml import Conversation, Turn

Row = Mapping[str, object]
Pair = tuple[str, str]
Kind = TypeVar("Kind")

NO_ANSWER, NO_QUESTION, NO_TURNS = "no answer", "no question", "no turns"
NOT_TEXT, HALF_CHARACTER = "content is not text", "half a character in the text"
NOT_ALTERNATING, TOOL_TURNS = "roles do not alternate", "tool turns"
# An image, video or audio that a text refers to: LLaVA's, LLaMA-Factory's and MMMU's marks, and
# Qwen-VL's and Qwen-Audio's. HTML and XML have these names too, so they count only
# where a line begins or ends, and none counts that is closed like an element.
_MEDIA = re.compile(
    r"<(?P<image>image)[ _]?\d+>|<img>(?P<img>[^<>]+)</img>"
    r"|<\|(?P<pad>image|video|audio)(?:_pad|_\d+)?\|>"
    r"|<audio>(?P<file>[^<>\s]+\.\w{2,4})</audio>"
    r"|^[ \t]*<(?P<first>image|video|audio)>|<(?P<last>image|video|audio)>[ \t]*$",
    re.MULTILINE,
)
SYSTEM_TURN = -1
# Turns that are not read, as keys beside the names of columns.
LAST_QUESTION, AFTER_BLANK = "a last question without an answer", "turns from a blank one on"
EMPTY: tuple[object, ...] = (None, "", [], {})  # values of a column that holds nothing
_KINDS = {"image": "images", "video": "videos", "audio": "audios"}
_JSON_NAMES: dict[type, str] = {
    **{type(None): "null", str: "text", bool: "true or false"},
    **{int: "a number", float: "a number", list: "a list", dict: "an object"},
    tuple: "not the same in all columns of this name",
}


class RowError(ValueError):
    """A row that cannot be read: wrong types, an unknown role, a missing key.

    `reason` is the same for all rows with this fault, for counting them; `detail` says what came
    and what was expected.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Dropped:
    """A source row, or a branch of one, that gives no conversation.

    `reason` and `detail` are as in `RowError`. `unreadable` marks rows that stop a run unless
    `bad_rows` is "skip" (broken JSON, an unknown role); others were read and hold nothing.
    """

    reason: str
    detail: str = ""
    unreadable: bool = False


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A row's pairs in order. Questions are stripped; either side of a pair may be blank."""

    system: str | None
    pairs: tuple[Pair, ...]
    unlearnt: frozenset[int] = frozenset()
    """Places of turns that the row marks as not to be learnt: 0 the first question, 1 its answer;
    SYSTEM_TURN."""
    fault: str = field(default="", compare=False)
    """Says which of the row's own turns is missing, should the dialogue give no conversation."""
    unread: tuple[str, ...] = field(default=(), compare=False)
    """Keys of the row that hold something which is not part of the dialogue."""


Outcome = Dialogue | Dropped
Result = Conversation | Dropped


def as_conversation(dialogue: Dialogue, default_system: str | None = None) -> Result:
    """The conversation to train on: the pairs before the first that lacks a side."""
    turns = _turns(dialogue)
    return _conversation(dialogue, turns[: len(turns) // 2 * 2], default_system)


def as_prompt(dialogue: Dialogue, default_system: str | None = None) -> tuple[Result, str | None]:
    """The conversation up to its last question, and the row's own answer to that, if any."""
    turns = _turns(dialogue)
    reference = turns.pop().text if turns and turns[-1].role == "assistant" else None
    return _conversation(dialogue, turns, default_system), reference


def turns_left_out(dialogue: Dialogue, used: int) -> str | None:
    """Words for the turns of a dialogue that come after the first `used`, None if there are none
    that say something."""
    if used == 2 * len(dialogue.pairs):
        return None
    rest = [not is_blank(text) for pair in dialogue.pairs for text in pair][used:]
    if not any(rest):
        return None
    return LAST_QUESTION if rest == [True, False] else AFTER_BLANK


def _turns(dialogue: Dialogue) -> list[Turn]:
    """The turns before the first blank side."""
    turns: list[Turn] = []
    unlearnt = dialogue.unlearnt
    for question, answer in dialogue.pairs:
        for role, text in (("user", question), ("assistant", answer)):
            if not text or text.isspace():
                return turns
            turns.append(Turn(role, text, not unlearnt or len(turns) not in unlearnt))
    return turns


def _conversation(dialogue: Dialogue, turns: list[Turn], default_system: str | None) -> Result:
    system = dialogue.system or default_system
    for place, turn in enumerate(turns, 1):
        if "<" in turn.text and (kind := media_in(turn.text)):
            return media_dropped(kind, f"the text of turn {place} refers to one")
    if turns:
        if half := _half_character([system or "", *[turn.text for turn in turns]]):
            return Dropped(HALF_CHARACTER, half)
        return Conversation(system, tuple(turns), SYSTEM_TURN not in dialogue.unlearnt)
    if not dialogue.pairs:
        return Dropped(NO_TURNS, dialogue.fault)
    return Dropped(NO_ANSWER if dialogue.pairs[0][0] else NO_QUESTION, dialogue.fault)


def _half_character(texts: list[str]) -> str:
    """Words for the first lone surrogate of the system text and the turns, "" if there is none.

    Texts that were cut in the middle of an emoji have one. The tokenizer would make it U+FFFD.
    """
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        place = next(place for place, text in enumerate(texts) if half in text)
        return f"{f'turn {place}' if place else 'the system text'} has \\u{ord(half):04x} alone"
    return ""


def dialogue_of(turns: Iterable[tuple[str, str]], system: str | None, before: int = 0) -> Outcome:
    """The dialogue of (role, text) turns, which must alternate, the user's first; a last question
    gets a blank answer. Of a row's turns `before` come earlier: a fault is named by its number."""
    texts: list[str] = []
    for place, (role, text) in enumerate(turns):
        expected = "assistant" if place % 2 else "user"
        if role != expected:
            fault = f"turn {before + place + 1} is the {role}'s; expected the {expected}'s"
            return Dropped(NOT_ALTERNATING, fault)
        texts.append(text if place % 2 else text.strip())
    return Dialogue(system, tuple(zip_longest(texts[::2], texts[1::2], fillvalue="")))


def media_in(text: str) -> str | None:
    """The kind of thing other than text that a text refers to: "image", "video" or "audio"."""
    for found in _MEDIA.finditer(text):
        kind = {"img": "image", "file": "audio"}.get(str(found.lastgroup)) or str(
            found[found.lastgroup or 0]
        )
        if found.lastgroup in ("img", "file", "pad") or f"</{kind}>" not in text:
            return kind
    return None


def media_dropped(kind: str, detail: str) -> Dropped:
    return Dropped(f"{_KINDS[kind]} are not read", detail)


def without_answer(dialogue: Dialogue) -> Dialogue:
    """The dialogue with its last question unanswered."""
    if not dialogue.pairs:
        return dialogue
    return replace(dialogue, pairs=(*dialogue.pairs[:-1], (dialogue.pairs[-1][0], "")))


def is_blank(text: str) -> bool:
    return not text or text.isspace()


def is_said(value: object) -> bool:
    """Whether a value is a text, a turn or a list of them, not a score."""
    return isinstance(value, str | list | dict) and value not in EMPTY


def text_of(row: Row, key: str) -> str:
    """The text under a key, "" if it is absent or null. Raises RowError for anything else."""
    value = row.get(key)
    if isinstance(value, str):
        return value
    return "" if value is None else _checked(value, str, key)


def system_of(row: Row, key: str = "system") -> str | None:
    """The system text under a key, stripped; None if it is absent, null or blank."""
    return text_of(row, key).strip() or None


def list_of(row: Row, key: str) -> list[object]:
    """The list under a key, empty if it is absent, null or a blank text. Tables have it as JSON in
    a text. Raises RowError for anything else."""
    value = row.get(key)
    if value is None:
        return []
    if isinstance(value, str):
        try:
            value = parsed(value) if value.strip() else []
        except (ValueError, RecursionError):
            fault = f"{key} is {quoted(value)}; expected a list, or the JSON of one"
            raise RowError("wrong type", fault) from None
    return _checked(value, list, key)


def object_of(value: object, what: str) -> Row:
    return _checked(value, dict, what)


def _checked(value: object, kind: type[Kind], what: str) -> Kind:
    if isinstance(value, kind):
        return value
    raise RowError("wrong type", f"{what} is {json_name(value)}; expected {_JSON_NAMES[kind]}")


def json_name(value: object) -> str:
    """The name of a value's type in JSON's own terms, for a message."""
    if isinstance(value, float) and value != value:
        return "NaN"
    return _JSON_NAMES.get(type(value), f"of type {type(value).__name__}")


def quoted(value: object) -> str:
    """A value for an error message: in quotes, on one line, cut when long."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def names(keys: Iterable[str], most: int = 12) -> str:
    """Keys for an error message, at most `most` of them."""
    listed = [key if key.isprintable() else repr(key) for key in map(str, keys)]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more or "none"
