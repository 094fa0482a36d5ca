"""Columns beside those of a row's shape: part of its conversation, or a reason not to train on it.

Readers know the columns that make a shape. All others are sorted here, alike for every reader: a
system text, a context, an instruction or an input, and the options of a choice join the dialogue.
Images, tools, an answer that is marked as bad, and preference data would make it mean something
else. Any other column is not read, and is counted, so that it can be said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qwen_ds.data.read.dialogue import (
    EMPTY,
    TOOL_TURNS,
    Dialogue,
    Dropped,
    Row,
    RowError,
    is_blank,
    is_said,
    json_name,
    media_dropped,
    quoted,
    text_of,
)

SYSTEM_KEYS = (
    "system", "system_prompt", "system_message", "systemPrompt", "sys_prompt", "meta_instruction",
    "meta_prompt",
)  # fmt: skip
CONTEXT_KEYS = (
    "context", "contexts", "passage", "passages", "document", "documents", "article", "paragraph",
    "background", "material", "story", "knowledge",
)  # fmt: skip
MEDIA_KEYS = {
    f"{name}{ending}": kind
    for kind, names in {
        "image": ("image", "images", "img"),
        "video": ("video", "videos"),
        "audio": ("audio", "audios"),
    }.items()
    for name in names
    for ending in ("", "_path", "_paths", "_url", "_urls", "_file")
}
ANSWER_KEYS = ("output", "response", "answer", "completion", "target")
TOOL_KEYS = ("tools", "functions")
KTO_KEYS = ("kto_tag", "label")
ROW_MASKS = ("loss", "train", "weight")
_PREFERENCE = re.compile(r"(?:chosen|rejected)(?:_(?!score|rating)\w+)?")
_OPTION = re.compile(r"(?:op|opt|option|choice)[_ ]?([A-Ha-h])|([A-H])")
_LETTERED = re.compile(r"\s*[(（]?[A-H][)）.．:：、]")
BAD_ANSWER, NOT_LEARNT = "answers marked as bad are not learnt", "rows marked as not to be learnt"
PREFERENCE = "preference data"
# What files without types, like CSV, write for a cell that holds nothing.
_UNSET = ("", "false", "none", "null", "nan", "n/a", "无", "0")
# A longer part that the question already holds was joined by whoever made the file.
_REPEATED = 20
# Parts that are the question itself: of another type, they are an error and not left out.
_ASKED = ("instruction", "prompt", "query", "question", "input")


@dataclass(frozen=True, slots=True)
class Parts:
    """Further columns of one question: "lead<tab>question<tab>after" below the `before` ones."""

    lead: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Companions:
    """A row's keys beside those of its shape, sorted."""

    system: tuple[str, ...] = ()
    lead: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()  # (letter, key); letter "" for a column of them all
    answers: tuple[str, ...] = ()  # answer columns, if there are several
    fateful: tuple[str, ...] = ()  # those that may drop the row
    unread: tuple[str, ...] = ()

    @property
    def joins(self) -> bool:
        """Whether any column may change the dialogue."""
        parts = self.system or self.lead or self.before or self.after
        return bool(parts or self.options or self.answers)

    def fate(self, row: Row, for_prompts: bool = False) -> Dropped | None:
        """Why the row gives no conversation, if a column says so. RowError for preference data.

        For prompts only images, tools and the like matter; the others are about the answer.
        """
        for key in self.fateful:
            value = row[key]
            if value is None or (for_prompts and not (key in MEDIA_KEYS or key in TOOL_KEYS)):
                continue
            if dropped := _fate(key, value, row):
                return dropped
        return None

    def has_bad_answer(self, row: Row) -> bool:
        """Whether KTO's tag says that the row's answer is no example."""
        tags = (key for key in self.fateful if key in KTO_KEYS and row[key] is not None)
        return any(_is_bad(key, row[key], row) for key in tags)

    def joined(self, dialogue: Dialogue, row: Row) -> Dialogue:
        """The dialogue with the columns that belong to it."""
        unread = list(dialogue.unread)
        system = dialogue.system
        for key in self.system:
            text = text_of(row, key).strip()
            if text and system is None:
                system = text
            elif text and text != system:
                unread.append(key)
        pairs = dialogue.pairs
        if pairs:
            question, answer = pairs[-1]
            if self.lead or self.before or self.after or self.options:
                question = self._question(question, row, unread)
            unread += [key for key in self.answers if _is_other(row[key], answer)]
            pairs = (*pairs[:-1], (question, answer))
        return replace(dialogue, system=system, pairs=pairs, unread=tuple(unread))

    def not_read(self, row: Row) -> list[str]:
        """The keys of columns that hold something and are no part of the dialogue."""
        found = [key for key in self.unread if row[key] not in EMPTY]
        if self.fateful:
            found += [key for key in self.fateful if not _is_heard(key, row[key], row)]
        return found

    def _question(self, own: str, row: Row, unread: list[str]) -> str:
        lead = _texts(row, self.lead, own, unread)
        after = _texts(row, self.after, own, unread)
        whole = "\t".join(text for text in (*lead, own, "\n".join(after)) if text)
        if not whole:
            return whole
        before = []
        for key in self.before:
            # A column `text` is a passage, or the whole row once more as somebody formatted it.
            if key == "text" and own and own in str(row[key]):
                unread.append(key)
            else:
                before += _texts(row, (key,), whole, unread)
        return "\n".join([*before, whole, *_options(row, self.options, unread)])


NONE_BESIDE = Companions()


def companions_of(
    keys: tuple[str, ...], own: tuple[str, ...], answers: tuple[str, ...], parts: Parts | None
) -> Companions:
    """Sort the keys of a row whose shape has the `own` ones; without `parts` the shape is turns."""
    others = [key for key in keys if key not in own or key == "system"]
    taken = parts or Parts()
    if any(key in ANSWER_KEYS for key in others):  # another whole shape beside this one
        taken = Parts(before=taken.before)
    system = tuple(key for key in SYSTEM_KEYS if key in others)
    lead, before, after = (
        tuple(key for key in wanted if key in others)
        for wanted in (taken.lead, taken.before, taken.after)
    )
    options = _option_columns(others) if parts is not None else ()
    # A shape that takes `chosen` for its answer needs nothing of the rejected one.
    is_chosen = "chosen" in keys and "chosen" in own
    fateful = [
        key for key in others if _may_drop(key) and not (is_chosen and _PREFERENCE.fullmatch(key))
    ]
    # Preference data first: all rows of such a file must end alike.
    fateful.sort(key=lambda key: not _PREFERENCE.fullmatch(key))
    used = {*system, *lead, *before, *after, *fateful, *(key for _, key in options)}
    given = tuple(key for key in answers if key in keys)
    found = Companions(
        system, lead, before, after, options, given if len(given) > 1 else (),
        tuple(fateful),
        tuple(key for key in others if key not in used),
    )  # fmt: skip
    return NONE_BESIDE if found == NONE_BESIDE else found


def preference_error(key: str) -> RowError:
    expected = "rows that end with one answer (data.columns names the columns to read)"
    return RowError(PREFERENCE, f"preference data: {key} is not read; expected {expected}")


def preference_key(row: Row) -> str | None:
    """The first key of preference data that holds a text, a turn or turns."""
    keys = (key for key in row if isinstance(key, str) and _PREFERENCE.fullmatch(key))
    return next((key for key in keys if is_said(row[key])), None)


def is_set(value: object) -> bool:
    """Whether a column of tools or media holds any; JSON in a text counts as what it spells."""
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in _UNSET:
            return False
        try:
            return is_set(json.loads(text)) if text[0] in '[{"' else True
        except (ValueError, RecursionError):
            return True
    if isinstance(value, list):
        return any(is_set(each) for each in value)
    if isinstance(value, dict):
        return any(is_set(each) for each in value.values())
    return value not in (*EMPTY, False) and value == value  # NaN is not


def _may_drop(key: str) -> bool:
    named = key in MEDIA_KEYS or key in TOOL_KEYS or key in KTO_KEYS or key in ROW_MASKS
    return named or _PREFERENCE.fullmatch(key) is not None


def _fate(key: str, value: object, row: Row) -> Dropped | None:
    if key in MEDIA_KEYS:
        return media_dropped(MEDIA_KEYS[key], f"{key} is not empty") if is_set(value) else None
    if key in TOOL_KEYS:
        return Dropped(TOOL_TURNS, f"{key} is not empty") if is_set(value) else None
    if key in KTO_KEYS:
        return Dropped(BAD_ANSWER, f"{key} is false") if _is_bad(key, value, row) else None
    if key in ROW_MASKS:
        is_off = value is False or (key == "weight" and value == 0)
        return Dropped(NOT_LEARNT, f"{key} is {json.dumps(value)}") if is_off else None
    if is_said(value):
        raise preference_error(key)
    return None


def _is_heard(key: str, value: object, row: Row) -> bool:
    """Whether a fateful column is empty, or has decided what becomes of the row."""
    if value in EMPTY or key in MEDIA_KEYS or key in TOOL_KEYS:
        return True
    if key in KTO_KEYS:
        return _is_tag(key, value, row)
    return key in ROW_MASKS and (isinstance(value, bool) or (key == "weight" and value == 0))


def _is_bad(key: str, value: object, row: Row) -> bool:
    """Whether a tag of KTO is false."""
    if key == "kto_tag" and not _is_tag(key, value, row):
        raise RowError("wrong type", f"kto_tag is {quoted(value)}; expected true or false")
    return _is_tag(key, value, row) and (str(value).strip().lower() in ("false", "0", "0.0"))


def _is_tag(key: str, value: object, row: Row) -> bool:
    """Whether a column is KTO's tag. `label` is one beside TRL's prompt and completion, and, if it
    is true or false, beside ms-swift's messages; else it is a class, as many data sets have it."""
    is_kto = key == "kto_tag" or {"prompt", "completion"} <= row.keys()
    if isinstance(value, bool) or str(value).strip().lower() in ("true", "false"):
        return is_kto or "messages" in row
    return is_kto and str(value).strip() in ("0", "1", "0.0", "1.0")


def _is_other(value: object, answer: str) -> bool:
    return isinstance(value, str) and not is_blank(value) and value.strip() not in answer


def _texts(row: Row, keys: Sequence[str], whole: str, unread: list[str]) -> list[str]:
    """The texts of columns, without blank ones and those that the question repeats anyway."""
    texts = []
    for key in keys:
        text = _text(row[key])
        if text is None:
            if key in _ASKED:
                came = json_name(row[key])
                raise RowError("wrong type", f"{key} is {came}; expected text or a list of texts")
            unread.append(key)
        elif text and (len(text) < _REPEATED or text not in whole):
            texts.append(text)
    return texts


def _text(value: object) -> str | None:
    """The text of a column, or of a list of texts, one a line; None for anything else."""
    if isinstance(value, str | None):
        return (value or "").strip()
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return "\n".join(map(str, value)).strip()
    return "" if value in EMPTY else None


def _option_columns(keys: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The columns of options by their letters: at least A and B, and no letter left out."""
    lettered: dict[str, str] = {}
    for key in keys:
        if found := _OPTION.fullmatch(key):
            lettered.setdefault((found[1] or found[2]).upper(), key)
    letters = "ABCDEFGH"[: len(lettered)]
    if len(lettered) > 1 and set(letters) == set(lettered):
        return tuple((letter, lettered[letter]) for letter in letters)
    return tuple(("", key) for key in ("options", "choices") if key in keys)[:1]


def _options(row: Row, columns: tuple[tuple[str, str], ...], unread: list[str]) -> list[str]:
    """The options of a choice, a line each: "A. text". None of them, where one is no text."""
    try:
        if columns and not columns[0][0]:
            return _listed_options(row[columns[0][1]], columns[0][1])
        texts = [(letter, _option(row[key], key)) for letter, key in columns]
    except RowError:
        unread += [key for _, key in columns]
        return []
    return [f"{letter}. {text}" for letter, text in texts if text]


def _listed_options(value: object, key: str) -> list[str]:
    if isinstance(value, str | None):
        return [value.strip()] if value and value.strip() else []
    if isinstance(value, dict):
        labels, texts = value.get("label"), value.get("text")
        if isinstance(labels, list) and isinstance(texts, list) and len(labels) == len(texts):
            value = dict(zip(map(str, labels), texts, strict=True))  # ARC
        return [f"{letter}. {_option(text, key)}" for letter, text in value.items() if text]
    if not isinstance(value, list):
        raise RowError("wrong type", f"{key} is {json_name(value)}; expected a list of texts")
    texts = [_option(text, key) for text in value]
    if all(_LETTERED.match(text) for text in texts):
        return texts
    return [f"{chr(ord('A') + place)}. {text}" for place, text in enumerate(texts)]


def _option(value: object, key: str) -> str:
    if isinstance(value, str | None):
        return (value or "").strip()
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return str(value)
    raise RowError("wrong type", f"an option of {key} is {json_name(value)}; expected text")
