"""Number types with a range, for the fields of options, so that each field carries its own rule.

jsonargparse checks them on the command line and in files; `parser.py` words the errors. For a type
checker each is the plain number that it restricts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jsonargparse.typing import restricted_number_type

# Each range, by its name, in the words of an error message.
IN_WORDS: dict[str, str] = {}

if TYPE_CHECKING:
    PositiveInt = int
    NonNegativeInt = int
    PromptBound = int
    AnswerBound = int
    RowBound = int
    PositiveFloat = float
    NonNegativeFloat = float
    Fraction = float
    Share = float
else:

    def _range(name: str, kind: type, words: str, *limits: tuple[str, int]) -> type:
        IN_WORDS[name] = words
        return restricted_number_type(name, kind, list(limits))

    PositiveInt = _range("PositiveInt", int, "a positive whole number", (">", 0))
    NonNegativeInt = _range("NonNegativeInt", int, "0 or a positive whole number", (">=", 0))
    PositiveFloat = _range("PositiveFloat", float, "a positive number", (">", 0))
    NonNegativeFloat = _range("NonNegativeFloat", float, "0 or a positive number", (">=", 0))
    Fraction = _range("Fraction", float, "a number from 0 to less than 1", (">=", 0), ("<", 1))
    Share = _range("Share", float, "a number above 0, up to 1", (">", 0), ("<=", 1))
    # A row that is cut gets its closing tokens back, so the bound must leave room for them; see
    # data/rows/encode.py. RowBound's 16 is its LEAST_ROOM.
    PromptBound = _range("PromptBound", int, "at least 3", (">=", 3))
    AnswerBound = _range("AnswerBound", int, "at least 2", (">=", 2))
    RowBound = _range("RowBound", int, "at least 16", (">=", 16))
