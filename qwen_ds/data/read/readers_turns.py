"""Readers of rows that hold a list of turns: OpenAI messages, ShareGPT's dialects, Firefly's pairs.

Three kinds of turn are told apart by their keys, whatever the list is called: {role, content},
{from, value}, and {human, assistant}, which is a question and its answer at once.
"""

from __future__ import annotations

from collections.abc import Callable

from qwen_ds.data.read.dialogue import (
    TOOL_TURNS,
    Dropped,
    Outcome,
    Row,
    RowError,
    dialogue_of,
    json_name,
    list_of,
    names,
    object_of,
    quoted,
    system_of,
    text_of,
)

TOOL = "tool"
# OpenAI's roles are a closed set, where "bot" is a mistake. ShareGPT's `from` is whatever an
# exporter wrote.
OPENAI_ROLES = {
    **{role: role for role in ("system", "user", "assistant")},
    **dict.fromkeys(("tool", "function"), TOOL),
}
SHAREGPT_ROLES = {
    **dict.fromkeys(("user", "human", "Human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "MOSS"), "assistant"),
    **dict.fromkeys(("tool", "function", "function_call", "observation"), TOOL),
    "system": "system",
}
_EXPECTED_OPENAI = "system, user, assistant"
_EXPECTED_SHAREGPT = "system, human, gpt, user, assistant"


class _NotText(Exception):
    """A turn holds something that is not text, such as an image."""


def read_turns(key: str) -> Callable[[Row], list[Outcome]]:
    """Make a reader of the turns under `key`. A leading system turn wins over a system column."""

    def read(row: Row) -> list[Outcome]:
        turns: list[tuple[str, str]] = []
        try:
            for place, value in enumerate(list_of(row, key)):
                turns += _read_turn(object_of(value, f"{key}[{place}]"), f"{key}[{place}]")
        except _NotText:
            return [Dropped("content is not text")]
        if any(role == TOOL for role, _ in turns):
            return [Dropped(TOOL_TURNS)]
        system = system_of(row)
        if turns and turns[0][0] == "system":
            system = turns.pop(0)[1].strip() or system
        return [dialogue_of(turns, system)]

    return read


def role_of(value: object, roles: dict[str, str], expected: str, key: str) -> str:
    """Our name of a role. Raises RowError for one that the format does not have."""
    role = roles.get(value) if isinstance(value, str) else None
    if role is None:
        raise RowError("unknown role", f"{key} is {quoted(value)}; expected one of {expected}")
    return role


def _read_turn(turn: Row, where: str) -> list[tuple[str, str]]:
    # Files from Arrow have every column in every row, so a key counts only if it is not null.
    if turn.get("role") is not None:
        role = role_of(turn["role"], OPENAI_ROLES, _EXPECTED_OPENAI, "role")
        if role == TOOL or turn.get("tool_calls") or turn.get("function_call"):
            return [(TOOL, "")]
        return [(role, _text_of_turn(turn, "content", where))]
    if turn.get("from") is not None:
        role = role_of(turn["from"], SHAREGPT_ROLES, _EXPECTED_SHAREGPT, "from")
        return [(role, "" if role == TOOL else _text_of_turn(turn, "value", where))]
    if "human" in turn or "assistant" in turn:
        return [("user", text_of(turn, "human")), ("assistant", text_of(turn, "assistant"))]
    expected = "role and content, from and value, or human and assistant"
    raise RowError("missing key", f"{where} has the keys {names(turn)}; expected {expected}")


def _text_of_turn(turn: Row, key: str, where: str) -> str:
    """The text of a turn: a string, null, or the joined texts of a list of parts."""
    if key not in turn:
        raise RowError("missing key", f"{where} has the keys {names(turn)}; expected {key}")
    value = turn[key]
    if isinstance(value, list):
        return "".join(_text_of_part(part, f"a part of {where}.{key}") for part in value)
    if isinstance(value, str | None):
        return value or ""
    came = f"{where}.{key} is {json_name(value)}"
    raise RowError("wrong type", f"{came}; expected text or a list of parts")


def _text_of_part(part: object, what: str) -> str:
    if isinstance(part, str):
        return part
    part = object_of(part, what)
    if part.get("type", "text") != "text":
        raise _NotText
    return text_of(part, "text")
