"""Number types with a range, for the fields of options, so that each field carries its own rule.

jsonargparse checks them on the command line and in files; `parser.py` words the errors. For a type
checker each is the plain number that it restricts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jsonargparse.typing import restricted_number_type

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
    PositiveInt = restricted_number_type("PositiveInt", int, (">", 0))
    NonNegativeInt = restricted_number_type("NonNegativeInt", int, (">=", 0))
    PositiveFloat = restricted_number_type("PositiveFloat", float, (">", 0))
    NonNegativeFloat = restricted_number_type("NonNegativeFloat", float, (">=", 0))
    Fraction = restricted_number_type("Fraction", float, [(">=", 0), ("<", 1)])
    Share = restricted_number_type("Share", float, [(">", 0), ("<=", 1)])
    # A row that is cut gets its closing tokens back, so the bound must leave room for them; see
    # data/rows/encode.py. RowBound's 16 is its LEAST_ROOM.
    PromptBound = restricted_number_type("PromptBound", int, (">=", 3))
    AnswerBound = restricted_number_type("AnswerBound", int, (">=", 2))
    RowBound = restricted_number_type("RowBound", int, (">=", 16))

# Each range in the words of an error message.
IN_WORDS = {
    "PositiveInt": "a positive whole number",
    "NonNegativeInt": "0 or a positive whole number",
    "PositiveFloat": "a positive number",
    "NonNegativeFloat": "0 or a positive number",
    "Fraction": "a number from 0 to less than 1",
    "Share": "a number above 0, up to 1",
    "PromptBound": "at least 3",
    "AnswerBound": "at least 2",
    "RowBound": "at least 16",
}


def plain_number(value: Any) -> Any:
    """The bare int or float of a restricted number, which YAML cannot write; else `value`."""
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value
