"""Types of options that carry a rule of their own: numbers with a range, and paths.

jsonargparse checks them on the command line and in files; `parser.py` words the errors. For a type
checker each is the plain number or text that it restricts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jsonargparse.typing import extend_base_type, restricted_number_type

# Each range, by its name, in the words of an error message.
IN_WORDS: dict[str, str] = {}

# What nobody means, but what a slipped exponent or `.inf` gives. Beyond it sums of steps, rows and
# seconds overflow, far from the option that is to blame.
MOST_INT, MOST_FLOAT = 10**9, 1e6
_UP_TO = f"up to {MOST_FLOAT:,.0f}"

if TYPE_CHECKING:
    PositiveInt = int
    NonNegativeInt = int
    Seed = int
    PromptBound = int
    AnswerBound = int
    RowBound = int
    PositiveFloat = float
    NonNegativeFloat = float
    FiniteFloat = float
    Fraction = float
    Share = float
    PathText = str
else:

    def _range(name: str, kind: type, words: str, *limits: tuple[str, float]) -> type:
        name = f"Bounded{name}"  # jsonargparse has a PositiveInt of its own, without an end
        IN_WORDS[name] = words
        return restricted_number_type(name, kind, list(limits))

    def _ints(name: str, words: str, least: int, most: int = MOST_INT) -> type:
        return _range(name, int, f"{words}, up to {most:,}", (">=", least), ("<=", most))

    PositiveInt = _ints("PositiveInt", "a positive whole number", 1)
    NonNegativeInt = _ints("NonNegativeInt", "0 or a positive whole number", 0)
    Seed = _ints("Seed", "0 or a positive whole number", 0, 2**63 - 1)
    # A row that is cut gets its closing tokens back, so the bound must leave room for them; see
    # data/rows/encode.py. RowBound's 16 is its LEAST_ROOM.
    PromptBound = _ints("PromptBound", "at least 3", 3)
    AnswerBound = _ints("AnswerBound", "at least 2", 2)
    RowBound = _ints("RowBound", "at least 16", 16)

    _most = ("<=", MOST_FLOAT)
    PositiveFloat = _range("PositiveFloat", float, f"a positive number, {_UP_TO}", (">", 0), _most)
    NonNegativeFloat = _range(
        "NonNegativeFloat", float, f"0 or a positive number, {_UP_TO}", (">=", 0), _most
    )
    FiniteFloat = _range("FiniteFloat", float, f"a number, {_UP_TO}", (">=", -MOST_FLOAT), _most)
    Fraction = _range("Fraction", float, "a number from 0 to less than 1", (">=", 0), ("<", 1))
    Share = _range("Share", float, "a number above 0, up to 1", (">", 0), ("<=", 1))

    def _is_text(_: type, value: object) -> None:
        if not isinstance(value, str):
            raise ValueError(f"invalid literal for a path: {value}")  # as int() words it

    # Any text here: `parser.py` looks at paths, which it also changes.
    PathText = extend_base_type("PathText", str, _is_text)
    IN_WORDS["PathText"] = "a path"
