"""The kinds of findings: each with its severity and advice. A new kind is one entry here.

stop: training on this teaches the wrong thing, or measures nothing. warn: the row is damaged, or is
somebody's personal data. note: often meant so; worth a look.

Rows with a stop or a warn are what `--write` leaves out, unless the finding is about the file or
an option and not about single rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["stop", "warn", "note"]
SEVERITIES: tuple[Severity, ...] = ("stop", "warn", "note")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of findings."""

    severity: Severity
    advice: str
    of_rows: bool = True  # False: it is about the file or an option, and costs no row its place
    masked: bool = False  # the place is shown with its middle hidden


def _file(severity: Severity, advice: str) -> Kind:
    return Kind(severity, advice, of_rows=False)


def _personal(what: str) -> Kind:
    return Kind("warn", f"remove or replace {what}: models repeat what they have seen", masked=True)


_KEEP_ONE = "keep one of them: repeated rows are learnt by heart"
_MEASURES_MEMORY = "take it out of the training rows: the evaluation would measure memory"
_TESTS_MEMORY = "take it out of the training rows: scores on this test set would be memory"
_CLEAN = "remove these characters: they are tokens of their own, which no user types"
_SOURCE = "read the source again in its true encoding: the text is lost here"
_INTRUDES = "check whether this script belongs here; translate or drop the row"

KINDS: dict[str, Kind] = {
    # Rows among themselves.
    "exact-duplicate": Kind("warn", _KEEP_ONE),
    "near-duplicate": Kind("warn", _KEEP_ONE),
    "duplicate-train-eval": Kind("stop", _MEASURES_MEMORY),
    "duplicate-test-set": Kind("stop", _TESTS_MEMORY),
    "near-duplicate-train-eval": Kind("stop", _MEASURES_MEMORY),
    "near-duplicate-test-set": Kind("stop", _TESTS_MEMORY),
    "same-question-different-answers": Kind(
        "note", "keep the best answer, unless several are wanted"
    ),
    "same-answer-many-questions": Kind("warn", "check whether the answer fits each question"),
    # Columns and reading.
    "empty-column": _file("stop", "name the columns that hold the texts: data.columns"),
    "constant-column": _file("stop", "name the column that differs between rows: data.columns"),
    "swapped-columns": Kind("stop", "swap question and answer: data.columns"),
    "empty-question": Kind("warn", "give the row a question, or drop it: it is not trained on"),
    "empty-answer": Kind("warn", "give the row an answer, or drop it: it is not trained on"),
    "role-order": Kind("stop", "let user and assistant alternate, the user first"),
    "unreadable-row": Kind("stop", "repair the row: training stops here (data.bad_rows)"),
    "not-trainable": Kind("warn", "see the detail: the row is read, and not trained on"),
    # Answers.
    "answer-equals-question": Kind("warn", "write an answer"),
    "answer-repeats-question": Kind("warn", "remove the question from the answer"),
    "answer-cut-midway": Kind("warn", "complete the answer: the model learns to stop there"),
    "cut-by-limit": _file("warn", "raise the limit"),
    "extreme-length": Kind("note", "check whether several texts ran together, or one is missing"),
    "loop": Kind("warn", "drop the row: the model learns to repeat itself"),
    "refusal": Kind("warn", "drop the row, or answer it: the model learns to refuse"),
    "foreign-identity": Kind("warn", "put your model's name, or drop the row"),
    "language-mismatch": Kind("warn", "answer in the language of the question"),
    "placeholder": Kind("warn", "fill it in, or drop the row"),
    # Marks left over.
    "unclosed-code-fence": Kind("warn", "close the code block"),
    "unclosed-bracket": Kind("note", "close the bracket, or check whether the text was cut"),
    "unclosed-quote": Kind("note", "close the quotation, or check whether the text was cut"),
    "special-token-in-text": Kind("warn", "remove it: it is text here, and no control token"),
    "chat-marker-in-text": Kind("warn", "split the text into turns, or remove the marker"),
    "tool-call-leftover": Kind("warn", "remove the call, or give the row the format of tool calls"),
    "html-leftover": Kind("warn", "remove the markup"),
    "literal-escape": Kind("warn", "decode the escapes: the model learns to write backslashes"),
    # Characters.
    "mojibake-latin1": Kind("warn", _SOURCE),
    "mojibake-gbk": Kind("warn", _SOURCE),
    "kun-kao": Kind("warn", _SOURCE),
    "replacement-character": Kind("warn", _SOURCE),
    "control-character": Kind("warn", _CLEAN),
    "zero-width-character": Kind("warn", _CLEAN),
    "bidi-character": Kind("warn", _CLEAN),
    "bom": Kind("warn", _CLEAN),
    "full-width-ascii": Kind("note", "write letters and digits in their plain form"),
    "kana": Kind("note", _INTRUDES),
    "hangul": Kind("note", _INTRUDES),
    "cyrillic": Kind("note", _INTRUDES),
    "traditional-among-simplified": Kind("note", "convert the row, or keep it for its own set"),
    # Personal data.
    "mail": _personal("mail addresses"),
    "phone": _personal("phone numbers"),
    "id-card": _personal("identity numbers"),
    "bank-card": _personal("card numbers"),
    "key-in-url": _personal("keys and passwords in addresses"),
    "access-key": _personal("access keys"),
    # Only with --model.
    "high-loss": Kind("note", "read these first: wrong labels have the highest loss"),
}
MASKED = frozenset(name for name, kind in KINDS.items() if kind.masked)
