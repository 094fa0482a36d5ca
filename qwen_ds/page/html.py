"""The environment of a page's templates: every text in it is shown, and none is obeyed."""

from __future__ import annotations

import unicodedata

import jinja2
from markupsafe import Markup

# Control and format characters, surrogates, private use, not assigned, line and paragraph
# separators: they reorder a text, or show as nothing or as a box.
_UNSEEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
_KEPT = frozenset("\n\t\u200c\u200d")  # emoji and several scripts are written with joiners


def environment(package: str) -> jinja2.Environment:
    """Templates of a package's folder, and `page.html.j2` of this one, with the blocks `title` and
    `content`, for them to extend.

    Values are escaped as HTML, and what reorders or cannot be seen in them is spelled (see
    `shown`). Filters: `cut(letters)`, `figure`, `count`. A name that the template is not given is
    an error.
    """
    loaders = [jinja2.PackageLoader(name, ".") for name in (package, __package__)]
    templates = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=shown,
    )
    templates.filters |= {"cut": cut, "figure": figure, "count": count}
    return templates


def shown(value: object) -> object:
    """The value for a page: in a text, characters that are not seen or that reorder others are
    spelled (\\x00, \\u202e); markup stays as it is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(
        ascii(letter)[1:-1]
        if unicodedata.category(letter) in _UNSEEN and letter not in _KEPT
        else letter
        for letter in value
    )


def cut(text: object, letters: int) -> str:
    """The text's first `letters`, and how many more there are."""
    whole = str(text)
    if len(whole) <= letters:
        return whole
    return f"{whole[:letters]}… ({len(whole) - letters:,} more characters)"


def figure(value: object) -> str:
    """A number in four digits; another value as it is, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A count with its noun: "1 row", "2,000 rows"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """A time in words: "12 s", "10 min", "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
