"""Readers of rows that hold a list of turns: OpenAI messages, ShareGPT's dialects, Firefly's pairs.

Three kinds of turn are told apart by their keys, whatever the list is called: {role, content},
{from, value}, and {human, assistant}, which is a question and its answer at once.

A turn that is marked as not to be learnt (OpenAI's `weight` 0, ms-swift's `loss` false, axolotl's
`train` false, or 0 in a row's `loss_mask`) is read and gives no targets. Whatever else a loss is
scaled by, a turn is learnt like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from qwen_ds.data.read.companions import MEDIA_KEYS, is_set
from qwen_ds.data.read.dialogue import (
    EMPTY,
    NO_TURNS,
    NOT_TEXT,
    TOOL_TURNS,
    Dropped,
    Outcome,
    Row,
    RowError,
    dialogue_of,
    is_blank,
    is_said,
    json_name,
    list_of,
    media_dropped,
    names,
    object_of,
    quoted,
    text_of,
)

TOOL = "tool"
# OpenAI's roles are a closed set, where "bot" is a mistake. ShareGPT's `from` is whatever an
# exporter wrote.
OPENAI_ROLES = {
    **{role: role for role in ("system", "user", "assistant")},
    "developer": "system",
    **dict.fromkeys(("tool", "function"), TOOL),
}
SHAREGPT_ROLES = {
    **dict.fromkeys(("user", "human", "Human", "prompter", "USER", "用户"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "bot", "MOSS", "chatgpt", "ASSISTANT", "助手"), "assistant"
    ),
    **dict.fromkeys(("tool", "function", "function_call", "observation"), TOOL),
    **dict.fromkeys(("system", "developer", "SYSTEM", "系统"), "system"),
}
_QUESTIONERS = {name for name, role in SHAREGPT_ROLES.items() if role in ("system", "user")}
_EXPECTED_OPENAI = "system, user, assistant"
_EXPECTED_SHAREGPT = "system, human, gpt, user, assistant"


# Marks of turns that are not learnt, and the values that each may have: (learnt, not learnt).
_FLAGS = ("loss", "train", "training", "learn")
_WEIGHTS = ("weight", "loss_weight", "loss_scale")
_SCALES = ("loss", "loss_weight", "loss_scale")  # these may be fractions, which is said
_PARTLY = ("train_detail", "training_detail")  # axolotl's masks of parts of a turn
_ROW_MASKS = ("loss_mask", "train_mask")
_MASKS = {*_ROW_MASKS, "mask"}
_OWN_KEYS = {"role": "content", "from": "value"}
_CALLS = ("tool_calls", "function_call", "tool_call_id")


class _Lost(Exception):
    """The whole row gives no conversation: a turn holds something other than text."""

    def __init__(self, dropped: Dropped) -> None:
        super().__init__(dropped.reason)
        self.dropped = dropped


_Turn = tuple[str, str, bool]  # role, text, whether it may be learnt


def read_turns(key: str) -> Callable[[Row], list[Outcome]]:
    """Make a reader of the turns under `key`. A leading system turn wins over a system column."""

    def read(row: Row) -> list[Outcome]:
        return _outcomes(row, {key: list_of(row, key)})

    return read


def read_turns_in_halves(
    question: str, answers: Sequence[str], other: Callable[[Row], list[Outcome]]
) -> Callable[[Row], list[Outcome]]:
    """Make a reader of TRL's conversational prompt and completion: turns under each, or a text
    under one. If both are texts, the `other` reader is asked."""

    def read(row: Row) -> list[Outcome]:
        answer = next((key for key in answers if is_said(row.get(key))), None)
        if not isinstance(row[question], list) and not isinstance(row.get(answer or ""), list):
            return other(row)
        halves = {}
        for key, role in ((question, "user"), (answer, "assistant")):
            if key is not None:
                said = row[key]
                halves[key] = said if isinstance(said, list) else [{"role": role, "content": said}]
        return _outcomes(row, halves)

    return read


def _outcomes(row: Row, lists: dict[str, list[object]]) -> list[Outcome]:
    """The outcome of a row whose turns stand in lists, here by their keys."""
    turns: list[_Turn] = []
    try:
        for key, values in lists.items():
            for place, value in enumerate(values):
                if type(value) is dict and (plain := _plain_turn(value)) is not None:
                    turns.append(plain)
                else:
                    turns += _read_turn(object_of(value, f"{key}[{place}]"), f"{key}[{place}]")
    except _Lost as lost:
        return [lost.dropped]
    if TOOL in [turn[0] for turn in turns]:
        place = next(n for n, turn in enumerate(turns, 1) if turn[0] == TOOL)
        return [Dropped(TOOL_TURNS, f"turn {place} calls a tool, or is its answer")]
    if not turns:
        key = next(iter(lists))
        return [Dropped(NO_TURNS, f"{key} is {'null' if row[key] is None else 'empty'}")]
    if not _MASKS.isdisjoint(row):
        turns = _masked(turns, row, sum(map(len, lists.values())))
    return [_dialogue(turns)]


def _dialogue(turns: list[_Turn]) -> Outcome:
    """The dialogue of one or more turns."""
    system, first = None, 0
    if turns[0][0] == "system":
        system, first = turns[0][1].strip() or None, 1
    found = dialogue_of([turn[:2] for turn in turns[first:]], system, first)
    if isinstance(found, Dropped):
        return found
    unlearnt = [place - first for place, turn in enumerate(turns) if not turn[2]]
    if unlearnt:
        found = replace(found, unlearnt=frozenset(unlearnt))
    if not found.pairs or is_blank(found.pairs[0][0]) or is_blank(found.pairs[0][1]):
        found = replace(found, fault=_missing(turns, first))
    return found


def _missing(turns: list[_Turn], first: int) -> str:
    """Words for the first turn that a conversation lacks."""
    for place in (first, first + 1):
        if place >= len(turns):
            last = "the system's" if turns[-1][0] == "system" else "a question"
            return f"turn {place}, {last}, is the last; expected turn {place + 1} after it"
        if is_blank(turns[place][1]):
            return f"turn {place + 1} has no text"
    return ""


def role_of(value: object, roles: dict[str, str], expected: str, key: str) -> str:
    """Our name of a role. Raises RowError for one that the format does not have."""
    role = roles.get(value) if isinstance(value, str) else None
    if role is None:
        raise RowError("unknown role", f"{key} is {quoted(value)}; expected one of {expected}")
    return role


def unread_of_turns(row: Row, key: str) -> list[str]:
    """Keys of turns that hold something which is not read: "messages[].reasoning_content"."""
    found: dict[str, None] = {}
    turns = row.get(key)
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        with suppress(RowError):
            turns = list_of(row, key)
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and len(turn) > 2:
            kind = _kind(turn)
            known = (kind, _OWN_KEYS[kind]) if kind else ("human", "assistant")
            for name, value in turn.items():
                if name not in known and value not in EMPTY and not _is_heard(name, value, turn):
                    found[f"{key}[].{name}"] = None
    return list(found)


def _is_heard(name: str, value: object, turn: Row) -> bool:
    if name in _SCALES and value not in (0, 1):
        return False
    if name in _FLAGS and value == 1:
        # Somebody wants a question to be learnt, which nothing here does.
        return turn.get("role", turn.get("from")) not in _QUESTIONERS
    return name in _FLAGS or name in _WEIGHTS or name in _CALLS or name in MEDIA_KEYS


def _kind(turn: Row) -> str | None:
    # Files from Arrow have every column in every row, so a key counts only if it is not null.
    if turn.get("role") is not None:
        return "role"
    return "from" if turn.get("from") is not None else None


def _plain_turn(turn: dict[str, object]) -> _Turn | None:
    """A turn of a role and a text and nothing else, as most are; None for any other."""
    role, text, roles = turn.get("role"), turn.get("content"), OPENAI_ROLES
    if role is None:
        role, text, roles = turn.get("from"), turn.get("value"), SHAREGPT_ROLES
    if len(turn) != 2 or not isinstance(role, str) or not isinstance(text, str):
        return None
    name = roles.get(role)
    return None if name is None or name == TOOL else (name, text, True)


def _read_turn(turn: Row, where: str) -> list[_Turn]:
    kind = _kind(turn)
    # Most turns have two keys, and nothing to look for beside them.
    learnt = len(turn) <= 2 or _is_learnt(turn, where)
    if kind == "role":
        role = role_of(turn["role"], OPENAI_ROLES, _EXPECTED_OPENAI, "role")
        if role == TOOL or turn.get("tool_calls") or turn.get("function_call"):
            return [(TOOL, "", True)]
        return [(role, _text_of_turn(turn, "content", where), learnt)]
    if kind == "from":
        role = role_of(turn["from"], SHAREGPT_ROLES, _EXPECTED_SHAREGPT, "from")
        text = "" if role == TOOL else _text_of_turn(turn, "value", where)
        return [(role, text, learnt)]
    if "human" in turn or "assistant" in turn:
        question, answer = text_of(turn, "human"), text_of(turn, "assistant")
        return [("user", question, learnt), ("assistant", answer, learnt)]
    expected = "role and content, from and value, or human and assistant"
    raise RowError("missing key", f"{where} has the keys {names(turn)}; expected {expected}")


def _is_learnt(turn: Row, where: str) -> bool:
    """Whether a turn with further keys may be learnt. _Lost, if a key refers to more than text."""
    learnt = True
    for key, value in turn.items():
        if value is None:
            continue
        if key in _FLAGS or key in _WEIGHTS:
            learnt &= _mark(key, value, where)
        elif key in _PARTLY and value not in EMPTY:
            raise _wrong_mark(f"{where}.{key}", value, "null: a turn is learnt whole or not at all")
        elif key in MEDIA_KEYS and is_set(value):
            raise _Lost(media_dropped(MEDIA_KEYS[key], f"{where}.{key} is not empty"))
    return learnt


def _mark(key: str, value: object, where: str) -> bool:
    """Whether a turn may be learnt, by one of its marks."""
    is_mark = key in _FLAGS or not isinstance(value, bool)
    if value in (0, 1) and is_mark:
        return value != 0
    if key in _SCALES and is_mark and isinstance(value, int | float) and value > 0:
        return True
    expected = "true or false" if key in _FLAGS else "0 or 1"
    raise _wrong_mark(f"{where}.{key}", value, expected)


def _masked(turns: list[_Turn], row: Row, count: int) -> list[_Turn]:
    """The turns under the masks of their row: a list with 0 or false for each that is not learnt.

    NeMo's `mask` names the role that is not learnt, which must be the user's.
    """
    mask = row.get("mask")
    if mask is not None and SHAREGPT_ROLES.get(str(mask).lower()) != "user":
        raise _wrong_mark("mask", mask, "a role that asks; loss_mask has 0 or 1 for each turn")
    for key in _ROW_MASKS:
        values = list_of(row, key)
        if not values:
            continue
        for place, value in enumerate(values):
            if not isinstance(value, int | float) or value not in (0, 1):
                raise _wrong_mark(f"{key}[{place}]", value, "0 or 1")
        if len(values) not in (count, len(turns)):
            fault = f"{key} has {len(values)} entries; expected {count}, one for each turn"
            raise RowError("wrong type", fault)
        spread = len(turns) // len(values)
        turns = [
            (role, text, learnt and bool(values[place // spread]))
            for place, (role, text, learnt) in enumerate(turns)
        ]
    return turns


def _wrong_mark(what: str, value: object, expected: str) -> RowError:
    return RowError("wrong type", f"{what} is {quoted(value)}; expected {expected}")


def _text_of_turn(turn: Row, key: str, where: str) -> str:
    """The text of a turn: a string, null, or the joined texts of a list of parts."""
    if key not in turn:
        raise RowError("missing key", f"{where} has the keys {names(turn)}; expected {key}")
    value = turn[key]
    if isinstance(value, list):
        return "".join(_text_of_part(part, f"{where}.{key}") for part in value)
    if isinstance(value, str | None):
        return value or ""
    came = f"{where}.{key} is {json_name(value)}"
    raise RowError("wrong type", f"{came}; expected text or a list of parts")


def _text_of_part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    part = object_of(part, f"a part of {where}")
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text"):
        raise _Lost(Dropped(NOT_TEXT, f"{where} has a part of the type {quoted(kind)}"))
    if "text" not in part:
        keys = ", ".join(f"`{key}`" for key in part if key != "type") or "no text"
        raise RowError("missing key", f"{where}: a part has {keys}; expected `text`")
    return text_of(part, "text")
