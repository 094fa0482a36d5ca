"""The table of row shapes that we read, and the choice of a row's reader.

A new shape is one line in `TABLE` and one function from a row to its dialogues. Rows are recognised
one by one, by their keys; the first line of the table that fits wins. So a file may mix shapes, and
no row's reading depends on another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from functools import lru_cache

from qwen_ds.data.read import readers_flat as flat
from qwen_ds.data.read import readers_marked as marked
from qwen_ds.data.read import readers_tree as tree
from qwen_ds.data.read.dialogue import Outcome, Row, RowError, names, object_of
from qwen_ds.data.read.readers_turns import read_turns
from qwen_ds.errors import UserError


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """One row shape. A row has it if it has all `keys` and, for training, one of any `answers`.

    `optional` keys are read if a row has them. With `pattern` a key must match it. Without `read` a
    row is one message of a tree, and `MessageTrees` puts the rows of a data set together.
    """

    name: str
    read: Callable[[Row], list[Outcome]] | None
    keys: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    pattern: re.Pattern[str] | None = None

    def fits(self, keys: Iterable[str], for_prompts: bool = False) -> bool:
        keys = set(keys)
        if self.pattern is not None and not any(self.pattern.fullmatch(key) for key in keys):
            return False
        answered = for_prompts or not self.answers or not keys.isdisjoint(self.answers)
        return answered and keys.issuperset(self.keys)

    @property
    def expected(self) -> str:
        """The keys that a row must have, in words."""
        parts = [*self.keys, " or ".join(self.answers)] if self.answers else self.keys
        return " + ".join(parts) or "round_0, round_1 .."

    @property
    def all_keys(self) -> tuple[str, ...]:
        return (*self.keys, *self.answers, *self.optional)


_COLUMNS = ("system", "history")


def _pair(name: str, question: str, *answers: str) -> Reader:
    return Reader(name, flat.column_pair(question, answers), (question,), answers, _COLUMNS)


# fmt: off
TABLE: tuple[Reader, ...] = (
    Reader("messages", read_turns("messages"), ("messages",), optional=("system",)),
    Reader("sharegpt", read_turns("conversations"), ("conversations",), optional=("system",)),
    Reader("conversation", read_turns("conversation"), ("conversation",), optional=("system",)),
    Reader("moss_003", marked.read_moss_003, ("chat",), optional=("meta_instruction",)),
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
           optional=("key", "system")),
    Reader("alpaca", flat.read_alpaca, ("instruction",), ("output",), ("input", *_COLUMNS)),
    Reader("hc3", flat.read_hc3, ("question", "chatgpt_answers"),
           optional=("human_answers", "system")),
    Reader("math23k", flat.read_math23k, ("original_text",), ("equation", "ans"), ("system",)),
    _pair("adgen", "content", "summary"),
    _pair("prompt", "prompt", "response", "answer", "completion", "output"),
    _pair("question", "question", "answer", "response"),
    _pair("query", "query", "response", "answer"),
    _pair("input", "input", "target", "output"),
    _pair("text", "text", "answer", "response"),
    # Instructions without answers: read, so that they are counted instead of stopping the run.
    Reader("instructionwild", flat.read_alpaca, ("instruction",), optional=("input", *_COLUMNS)),
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
    candidates = _fitting(keys, for_prompts)
    if not candidates:
        expected = nearest(keys)
        raise RowError("unknown keys", f"keys found: {names(keys)}; keys expected: {expected}")
    # Arrow files have every column in every row, so a null column says nothing about the shape.
    filled = (each for each in candidates if all(row[key] is not None for key in each.keys))
    return next(filled, candidates[0])


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
def _fitting(keys: tuple[str, ...], for_prompts: bool) -> tuple[Reader, ...]:
    complete = tuple(reader for reader in TABLE if reader.fits(keys))
    return complete or tuple(reader for reader in TABLE if reader.fits(keys, for_prompts))
