"""The table of row shapes that we read, and the choice of a row's reader.

A new shape is one line in `TABLE` and one function from a row to its dialogues. Rows are recognised
one by one, by their keys; the first line of the table that fits wins. So a file may mix shapes, and
no row's reading depends on another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher, get_close_matches
from functools import lru_cache

from qwen_ds.data.read import readers_flat as flat
from qwen_ds.data.read import readers_marked as marked
from qwen_ds.data.read import readers_tree as tree
from qwen_ds.data.read.companions import (
    ANSWER_KEYS,
    CONTEXT_KEYS,
    NONE_BESIDE,
    Companions,
    Parts,
    companions_of,
    preference_error,
    preference_key,
)
from qwen_ds.data.read.dialogue import (
    Dialogue,
    Outcome,
    Row,
    RowError,
    is_blank,
    is_said,
    names,
    object_of,
    without_answer,
)
from qwen_ds.data.read.readers_turns import read_turns, read_turns_in_halves, unread_of_turns
from qwen_ds.errors import UserError


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """One row shape. A row has it if it has all `keys` and, for training, one of any `answers`.

    `also` are answers that do as well and that messages leave out. `optional` keys are read if a
    row has them. With `pattern` a key must match it. Without `of_row` a row is one message of a
    tree, and `MessageTrees` puts the rows of a data set together.
    """

    name: str
    of_row: Callable[[Row], list[Outcome]] | None
    keys: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    parts: Parts | None = None
    """Further columns of the question; None where the question is not one column."""
    turns: tuple[str, ...] = ()
    """Keys of lists of turns."""
    pattern: re.Pattern[str] | None = None
    all_keys: tuple[str, ...] = field(init=False)
    """Keys of the shape, companions left out."""

    def __post_init__(self) -> None:
        keys = (*self.keys, *self.answers, *self.also, *self.optional)
        object.__setattr__(self, "all_keys", keys)

    def fits(self, keys: Iterable[str], for_prompts: bool = False) -> bool:
        return _fits(self, tuple(keys), for_prompts)

    def read(
        self, row: Row, for_prompts: bool = False, beside: Companions | None = None
    ) -> list[Outcome]:
        """The outcomes of a row, with what the columns beside its shape say."""
        assert self.of_row is not None, "a message of a tree is no dialogue"
        beside = beside or self.beside(row)
        if beside is NONE_BESIDE:
            return self.of_row(row)
        if beside.fateful and (dropped := beside.fate(row, for_prompts)):
            return [dropped]
        outcomes = self.of_row(row)
        if beside.joins:
            outcomes = [
                beside.joined(found, row) if isinstance(found, Dialogue) else found
                for found in outcomes
            ]
        if for_prompts and beside.fateful and beside.has_bad_answer(row):
            outcomes = [
                without_answer(found) if isinstance(found, Dialogue) else found
                for found in outcomes
            ]
        return outcomes

    def beside(self, row: Row) -> Companions:
        """The columns of a row beside the reader's own."""
        return _beside(self, tuple(row))

    def not_read(self, row: Row, beside: Companions, outcomes: Sequence[Outcome] = ()) -> list[str]:
        """The keys that hold something and are no part of the row's conversations."""
        found = [] if beside is NONE_BESIDE else beside.not_read(row)
        for key in self.turns:
            found += unread_of_turns(row, key)
        for outcome in outcomes:
            if isinstance(outcome, Dialogue) and outcome.unread:
                found += outcome.unread
        return list(dict.fromkeys(found)) if len(found) > 1 else found

    @property
    def expected(self) -> str:
        """The keys that a row must have, in words."""
        parts = [*self.keys, " or ".join(self.answers)] if self.answers else self.keys
        return " + ".join(parts) or "round_0, round_1 .."

    @property
    def mappable(self) -> tuple[str, ...]:
        """The keys that data.columns may name."""
        parts = self.parts or Parts()
        return (*self.all_keys, "system", *parts.lead, *parts.before, *parts.after)


@lru_cache(maxsize=1024)
def _fits(reader: Reader, keys: tuple[str, ...], for_prompts: bool) -> bool:
    if reader.pattern is not None and not any(reader.pattern.fullmatch(key) for key in keys):
        return False
    answers = (*reader.answers, *reader.also)
    answered = for_prompts or not answers or not set(keys).isdisjoint(answers)
    return answered and set(keys).issuperset(reader.keys)


@lru_cache(maxsize=1024)
def _beside(reader: Reader, keys: tuple[str, ...]) -> Companions:
    """The columns beside the reader's own; cached, since the rows of a file have the same keys."""
    own = reader.all_keys
    if reader.pattern is not None:
        own += tuple(key for key in keys if reader.pattern.fullmatch(key))
    return companions_of(keys, own, (*reader.answers, *reader.also), reader.parts)


_COLUMNS = ("system", "history")
_MASKS = ("loss_mask", "train_mask", "mask")


def _turns(name: str, key: str) -> Reader:
    return Reader(name, read_turns(key), (key,), optional=("system", *_MASKS), turns=(key,))


def _pair(name: str, question: str, answers: tuple[str, ...], parts: Parts) -> Reader:
    also = tuple(key for key in ANSWER_KEYS if key not in answers) if name != "adgen" else ()
    every = (*answers, *also)
    read = flat.column_pair(question, every)
    if name != "prompt":
        return Reader(name, read, (question,), answers, _COLUMNS, also, parts)
    read = read_turns_in_halves(question, every, read)
    return Reader(name, read, (question,), answers, _COLUMNS, also, parts, (question, *every))


_OF_ALPACA = ("response", "answer", "chosen", "completion", "target", "summary")
_INSTRUCTIONS = ("instruction", "prompt", "query", "question")
_ALPACA_PARTS = Parts(after=(*CONTEXT_KEYS, "content", "query", "question"))

# fmt: off
TABLE: tuple[Reader, ...] = (
    _turns("messages", "messages"),
    _turns("sharegpt", "conversations"),
    _turns("conversation", "conversation"),
    Reader("moss_003", marked.read_moss_003, ("chat",), optional=("meta_instruction", *_MASKS),
           turns=("chat",)),
    Reader("oasst_trees", tree.read_tree, ("message_tree_id", "prompt"), optional=("tree_state",)),
    Reader("oasst_messages", None, ("message_id", "parent_id", "text", "role"),
           optional=("tree_state", "deleted")),
    Reader("moss_002", marked.read_moss_002, ("plain_text",), optional=("prefix",)),
    Reader("refgpt", marked.read_refgpt, ("dialogue",), optional=("system",)),
    Reader("coig_exam", flat.read_coig_exam, ("textbox_question",),
           ("textbox_answer", "textbox_answer_analysis"),
           ("textbox_q_instruction", "textbox_q_context", "system")),
    Reader("coig_translated", flat.read_coig_translated, ("trans_instruction",), ("trans_output",),
           ("trans_input", "system")),
    Reader("coig_rounds", flat.read_coig_rounds, pattern=re.compile(r"round_\d+"),
           optional=("system",)),
    Reader("sharegpt_translation", marked.read_sharegpt_translation, ("translation",),
           optional=("system",)),
    Reader("alpaca", flat.alpaca(("output", *_OF_ALPACA)), ("instruction",), ("output",),
           ("input", *_COLUMNS), _OF_ALPACA, _ALPACA_PARTS),
    Reader("hc3", flat.read_hc3, ("question", "chatgpt_answers"), optional=("system",),
           parts=Parts(before=CONTEXT_KEYS)),
    Reader("math23k", flat.read_math23k, ("original_text",), ("equation", "ans"), ("system",),
           parts=Parts()),
    _pair("adgen", "content", ("summary",),
          Parts(_INSTRUCTIONS, before=(*CONTEXT_KEYS, "title"))),
    _pair("prompt", "prompt", ("response", "answer", "completion", "output"),
          Parts(after=(*CONTEXT_KEYS, "content", "query", "question", "input"))),
    _pair("question", "question", ("answer", "response"),
          Parts(before=(*CONTEXT_KEYS, "content", "text"), after=("input",))),
    _pair("query", "query", ("response", "answer"),
          Parts(before=(*CONTEXT_KEYS, "content"), after=("input",))),
    _pair("input", "input", ("target", "output"), Parts(before=CONTEXT_KEYS)),
    _pair("text", "text", ("answer", "response"), Parts(before=(*CONTEXT_KEYS, "title"))),
    # Instructions without answers: read, so that they are counted instead of stopping the run.
    Reader("instructionwild", flat.alpaca(()), ("instruction",), optional=("input", *_COLUMNS),
           parts=_ALPACA_PARTS),
)
# fmt: on
READERS: dict[str, Reader] = {reader.name: reader for reader in TABLE}


def reader_named(name: str) -> Reader:
    """The reader that `data.format` names. UserError, with the nearest name, if there is none."""
    if name in READERS:
        return READERS[name]
    near = get_close_matches(name, READERS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"data.format is {name!r}; expected auto or one of {', '.join(READERS)}{hint}")


def find_reader(row: object, for_prompts: bool = False) -> Reader:
    """The reader whose keys the row has. RowError, with the keys found and expected, if none fits.

    With `for_prompts` a row needs no answer, but one that has an answer is still recognised by it.
    """
    row = object_of(row, "the row")
    keys = tuple(row)
    candidates = fitting(keys, for_prompts)
    if not candidates:
        if (key := preference_key(row)) is not None:
            raise preference_error(key)
        hint = f"{nested}; " if (nested := nested_answer(row)) else ""
        expected = nearest(keys)
        fault = f"{hint}keys found: {names(keys)}; keys expected: {expected}"
        raise RowError("unknown keys", fault)
    # Arrow files have every column in every row, so a null column says nothing about the shape.
    for each in candidates:
        if None not in [row[key] for key in each.keys]:
            return each
    return candidates[0]


@lru_cache(maxsize=1024)
def nearest(keys: tuple[str, ...]) -> str:
    """The three shapes nearest to some keys, in words, for the message about a row without one."""
    usual = ("messages", "sharegpt", "alpaca", "adgen")

    def likeness(reader: Reader) -> tuple[int, float, bool]:
        needed = [(key,) for key in reader.keys or ("round_0",)]
        ratios = [
            max(SequenceMatcher(None, key, want).ratio() for key in keys[:50] for want in wanted)
            for wanted in (*needed, reader.answers)
            if wanted
        ]
        exact = sum(ratio == 1 for ratio in ratios)
        return exact, round(sum(ratios) / len(ratios), 3), reader.name in usual

    shown = [READERS[name] for name in usual]
    if keys:
        shown = sorted(TABLE, key=likeness, reverse=True)[:3]
    return ", or ".join(f"{reader.expected} ({reader.name})" for reader in shown)


@lru_cache(maxsize=1024)
def fitting(keys: tuple[str, ...], for_prompts: bool) -> tuple[Reader, ...]:
    """The readers whose keys are among these, the best first."""
    complete = tuple(reader for reader in TABLE if reader.fits(keys))
    return complete or tuple(reader for reader in TABLE if reader.fits(keys, for_prompts))


def with_first_texts(row: object, keys: Sequence[str]) -> object:
    """A row whose lists of texts under these keys are their first text that says something."""
    if not isinstance(row, dict):
        return row
    texts = {}
    for key in keys:
        value = row.get(key)
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            texts[key] = next((text for text in value if not is_blank(text)), "")
    return row | texts if texts else row


def nested_answer(row: Row) -> str:
    """Words for an answer that lies deeper than readers look, "" if there is none.

    Self-instruct has it in `instances`, SQuAD in `answers`.
    """
    for key, value in row.items():
        inner = value[0] if isinstance(value, list) and value else value
        if isinstance(inner, dict):
            place = f"{key}[]" if isinstance(value, list) else key
            found = next(
                (name for name in (*ANSWER_KEYS, "text") if is_said(inner.get(name))), None
            )
            if found:
                return f"{place}.{found} is not read"
        elif key == "answers" and is_said(value):
            return "answers is not read"
    return ""
