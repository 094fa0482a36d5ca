"""Rows that measure what a model could do before: plain texts, and questions of multiple choice."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_ds.data.read.dialogue import names
from qwen_ds.data.read.files import BadRow
from qwen_ds.data.read.limits import DEFAULT, FileOptions
from qwen_ds.data.read.places import locate, rows_of
from qwen_ds.errors import UserError
from serve.scores.likelihood import Choices, PlainText

MOST_EXAMPLES = 5  # before a question, as in C-Eval
LETTERS = "ABCDEFGHIJ"
_SPLIT = re.compile(r"[_-](dev|val|test|train)\Z")
_EXPECTED = "expected text, or question, A, B, .. and answer"


@dataclass(frozen=True, slots=True)
class MultipleChoice:
    """One question with its choices; `answer` is the place of the right one."""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int

    @property
    def letters(self) -> tuple[str, ...]:
        return tuple(LETTERS[: len(self.choices)])

    def spelled(self, answered: bool) -> str:
        """The question as Qwen's own eval/evaluate_ceval.py spells it; with its answer, an
        example."""
        lines = [f"问题：{self.question}"]
        lines += [f"{a}. {text}" for a, text in zip(self.letters, self.choices, strict=True)]
        end = f"答案：{self.letters[self.answer]}\n\n" if answered else "答案："
        return "\n".join([*lines, end])


@dataclass(frozen=True, slots=True)
class GeneralRow:
    """One row to measure: its number, its place, and what is asked of the model."""

    id: int
    source: str
    item: PlainText | Choices
    answer: int | None = None  # of multiple choice: the place of the right one


def read_general(
    paths: Sequence[str], examples: Sequence[str] = (), files: FileOptions = DEFAULT
) -> list[GeneralRow]:
    """Read texts and questions. Up to five of `examples` with a question's subject, or else of
    all, stand before it; a question is no example of itself.

    UserError: nothing to read, or a row of another kind.
    """
    shown = [row for _, row in _rows(examples, files) if isinstance(row, MultipleChoice)]
    if examples and not shown:
        raise UserError(f"{', '.join(examples)}: no questions; expected examples with answers")
    of_subject: dict[str, list[MultipleChoice]] = defaultdict(list)
    for one in shown:
        of_subject[one.subject].append(one)
    found = list[GeneralRow]()
    for source, row in _rows(paths, files):
        if isinstance(row, PlainText):
            found.append(GeneralRow(len(found), source, row))
            continue
        others = [e for e in of_subject.get(row.subject) or shown if e.question != row.question]
        prompt = "".join(one.spelled(True) for one in others[:MOST_EXAMPLES]) + row.spelled(False)
        found.append(GeneralRow(len(found), source, Choices(prompt, row.letters), row.answer))
    return found


def _rows(
    paths: Sequence[str], files: FileOptions
) -> Iterator[tuple[str, PlainText | MultipleChoice]]:
    for path in paths:
        for row in rows_of(locate(path), files):
            if isinstance(row, BadRow):
                raise UserError(f"{row.source}: {row.detail}")
            yield row.source, _row(row.row, row.source)


def _row(row: object, source: str) -> PlainText | MultipleChoice:
    if not isinstance(row, dict):
        raise UserError(f"{source}: found {type(row).__name__}; {_EXPECTED}")
    cells = {key if key in LETTERS else key.lower(): value for key, value in row.items()}
    if "question" in cells and "A" in cells:
        return _question(cells, source)
    if "text" not in cells:
        raise UserError(f"{source}: found {names(row)}; {_EXPECTED}")
    text = cells["text"]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{source}: text is empty or no text; expected at least one character")
    return PlainText(text)


def _question(cells: dict[str, object], source: str) -> MultipleChoice:
    letters = []
    for letter in LETTERS:
        if cells.get(letter) in (None, ""):
            break
        letters.append(letter)
    if len(letters) < 2:
        raise UserError(f"{source}: {len(letters)} choices; expected at least A and B")
    answer = str(cells.get("answer") or "").strip().upper()
    if answer not in letters:
        expected = f"expected one of {', '.join(letters)} (C-Eval's test set has none: take val)"
        raise UserError(f"{source}: answer is {answer or 'empty'}; {expected}")
    question = str(cells["question"]).strip()
    if not question:
        raise UserError(f"{source}: question is empty; expected a text")
    subject = str(cells.get("subject") or _SPLIT.sub("", Path(_file_of(source)).stem))
    choices = tuple(str(cells[letter]).strip() for letter in letters)
    return MultipleChoice(subject, question, choices, letters.index(answer))


def _file_of(source: str) -> str:
    return source.rpartition(":")[0]
