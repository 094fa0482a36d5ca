"""JSON as people ship it: lines, one array, or objects one after another; read piece by piece.

The beginning of the first value decides. `[` makes the file an array. A complete first line makes
it JSON lines, where every line stands alone, so that a broken one does not spoil others. A first
object that spans several lines makes it a file of objects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from qwen_ds.data.read.files_text import Lines, shown, undecodable
from qwen_ds.data.read.limits import FileOptions
from qwen_ds.errors import UserError

# Files that were joined by `cat` have byte order marks inside.
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")
# Brackets, and strings as a whole, so that brackets inside them do not count. A string without a
# closing quote runs to the end of the text.
_STRUCTURE = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?P<closed>"?)|[{}\[\]]', re.DOTALL)
_DEEPER = {"{": 1, "[": 1, "}": -1, "]": -1}  # of a match's text; a string changes no depth
_MORE_MUST_FOLLOW = ",[{:"
# As `_STRUCTURE`, for broken text: no string goes over a line break.
_ON_A_LINE = r'"[^"\\\n]*(?:\\[^\n][^"\\\n]*)*"?|[{}\[\]]'
_UNDECODED = re.compile("[\udc80-\udcff]")


class SourceRow(NamedTuple):
    """One row of a file as json, csv or pyarrow returns it. `source` ("file:line") is its start.
    `split` is the one that was asked, if the row comes from a part of a file that is named for it.
    """

    row: object
    source: str
    split: str | None = None


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read. `detail` says what came and what was expected."""

    source: str
    reason: str
    detail: str


def parsed(text: str) -> object:
    """The value of a JSON text, read as a row is. ValueError or RecursionError if it is none."""
    return _DECODER.decode(text)


def stands_alone(line: str) -> bool:
    """Whether every object and array that the line opens also ends in it, as in JSON lines."""
    depth = 0
    for token in _STRUCTURE.finditer(line):
        depth += _DEEPER.get(token[0], 0)
        if token["closed"] == "":
            return True  # no JSON string goes over a line break: it is one broken line
    return depth <= 0


class _RepeatedKey(ValueError):
    """An object that has two values for one key."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        kept: dict[str, object] = {}
        for key, value in pairs:
            if kept.setdefault(key, value) != value:
                raise _RepeatedKey(f"the key {key!r} is there twice, with two values")
    return found


# pandas writes NaN and Infinity for cells that have no value.
_DECODER = json.JSONDecoder(parse_constant=lambda _: None, object_pairs_hook=_object)


def iter_lines(lines: Lines, encoding: str) -> Iterator[SourceRow | BadRow]:
    """Rows of JSON lines. Blank lines are skipped; a broken line is a BadRow of its own."""
    for raw in lines:
        if raw.isspace():
            continue
        lines.held = 0
        source = f"{lines.name}:{lines.number}"
        try:
            text = raw.decode(encoding).lstrip()
            value, end = _DECODER.raw_decode(text)
            if end < len(text) and not text[end:].isspace():
                raise json.JSONDecodeError("Extra data", text, end)
            yield SourceRow(value, source)
        except UnicodeDecodeError as error:
            yield bad_bytes(source, encoding, error)
        except (ValueError, RecursionError) as error:
            yield from _several_on_a_line(text, source, error)


def iter_objects(
    chunks: Iterator[str], name: str, options: FileOptions, encoding: str
) -> Iterator[SourceRow | BadRow]:
    """Rows of one or more objects one after another, each over one or more lines, perhaps with
    commas between them. In the text an undecodable byte is a surrogate, as `surrogateescape` has
    it: the object that holds it is a BadRow.

    A broken object ends with its last bracket, or where a line opens the next one: with `{` at the
    first object's indentation, where JSON allows no object.
    """
    text = _Arriving(chunks, name, options)
    text.skip_space()
    margin = text.text[text.text.rfind("\n", 0, text.place) + 1 : text.place].lstrip("\ufeff")
    marks = re.compile(rf"{_ON_A_LINE}|\n(?={margin}\{{)")
    while text.place < len(text.text):
        yield _object_of(text, marks, encoding)
        text.skip_space()
        if text.starts_with(","):
            text.skip(",")


def _object_of(text: _Arriving, marks: re.Pattern[str], encoding: str) -> SourceRow | BadRow:
    line = text.line
    while True:
        begin, fault = text.place, None
        value: object = None
        try:
            value, end = _DECODER.raw_decode(text.text, begin)
        except (ValueError, RecursionError) as error:
            # What is wrong on the last line may be that the rest of it has not arrived.
            at = error.pos if isinstance(error, json.JSONDecodeError) else begin
            end = -1
            if text.is_complete or text.text.find("\n", at) >= 0:
                end = _end_of_broken(text.text, begin, marks)
            if end < 0 and not text.is_complete:
                text.more()
                continue
            fault = _fault_of_object(text.text, end, error, f"{text.name}:{line}", begin)
            end = len(text.text) if end < 0 else end
        if damage := _UNDECODED.search(text.text, begin, end):
            line += text.text.count("\n", begin, damage.start())
            byte = bytes([ord(damage[0]) - 0xDC00])
            error_of_byte = UnicodeDecodeError(encoding, byte, 0, 1, "")
            fault = bad_bytes(f"{text.name}:{line}", encoding, error_of_byte)
        text.move_to(end)
        return fault or SourceRow(value, f"{text.name}:{line}")


def _end_of_broken(text: str, begin: int, marks: re.Pattern[str]) -> int:
    """Where the broken object that begins here ends; -1 if nothing tells."""
    if text[begin] not in "{[":
        return text.find("\n", begin)
    depth = 0
    for mark in marks.finditer(text, begin):
        if mark[0] == "\n":
            last = mark.start()
            while text[last - 1].isspace():
                last -= 1
            if text[last - 1] not in _MORE_MUST_FOLLOW:
                return mark.end()
        deeper = _DEEPER.get(mark[0], 0)
        depth += deeper
        if deeper < 0 and depth <= 0:
            return mark.end()
    return -1


def _fault_of_object(text: str, end: int, error: Exception, source: str, begin: int) -> BadRow:
    if text[begin] in "{[" and end < 0:
        return _not_json(source, "the file ends inside the object that begins here")
    if text[begin] in "{[" and text[end - 1] == "\n":
        return _not_json(source, "the object is not closed before the next one")
    return _fault(error, source, begin)


def iter_array(
    chunks: Iterator[str], name: str, options: FileOptions
) -> Iterator[SourceRow | BadRow]:
    """The elements of one JSON array, or of several one after another, read as the text arrives.

    A broken element whose end can be found is a BadRow. If it cannot be found, or the array itself
    is broken, nothing after that can be trusted: UserError.
    """
    text = _Arriving(chunks, name, options)
    text.skip_space()
    while True:
        yield from _elements(text, name)
        if text.here() == "the end of the file":
            return
        if not text.starts_with("["):
            came = f"{text.here()} after the end of the JSON array"
            raise UserError(f"{name}:{text.line}: {came}; expected nothing more")


def _elements(text: _Arriving, name: str) -> Iterator[SourceRow | BadRow]:
    text.skip("[")
    if not text.starts_with("]"):
        while True:
            yield _element(text, name)
            text.skip_space()
            if not text.starts_with(","):
                break
            text.skip(",")
            if text.starts_with("]"):
                came = "a comma before the ']' that closes the JSON array"
                raise UserError(f"{name}:{text.line}: {came}; expected another row, or no comma")
    if not text.starts_with("]"):
        came = f"{text.here()} inside a JSON array"
        raise UserError(f"{name}:{text.line}: {came}; expected ',' or ']'")
    text.skip("]")


def bad_bytes(source: str, encoding: str, error: UnicodeDecodeError) -> BadRow:
    return BadRow(source, f"not {shown(encoding)} text", undecodable(encoding, error))


class _Arriving:
    """A text that arrives in chunks, and our place in it; what has been read is freed."""

    def __init__(self, chunks: Iterator[str], name: str, options: FileOptions) -> None:
        self.chunks, self.name, self.options = chunks, name, options
        self.text = next(chunks, "").lstrip("\ufeff")
        self.place, self.line, self.is_complete = 0, 1, False

    def more(self) -> None:
        """Double the text ahead, so that the repeated scans of a long element stay linear."""
        parts, fetched = [self.text[self.place :]], 0
        if len(parts[0]) > self.options.row_bytes:
            raise self.options.too_long(f"{self.name}:{self.line}")
        while fetched < max(len(parts[0]), 1):
            chunk = next(self.chunks, None)
            if chunk is None:
                self.is_complete = True
                break
            parts.append(chunk)
            fetched += len(chunk)
        self.text, self.place = "".join(parts), 0

    def move_to(self, place: int) -> None:
        self.line += self.text.count("\n", self.place, place)
        self.place = place

    def skip_space(self) -> None:
        while True:
            self.move_to(_end_of_space(self.text, self.place))
            if self.place < len(self.text) or self.is_complete:
                return
            self.more()

    def starts_with(self, mark: str) -> bool:
        return self.text.startswith(mark, self.place)

    def skip(self, mark: str) -> None:
        self.move_to(self.place + len(mark))
        self.skip_space()

    def here(self) -> str:
        if self.place >= len(self.text):
            return "the end of the file"
        return repr(self.text[self.place : self.place + 20])


def _element(text: _Arriving, name: str) -> SourceRow | BadRow:
    source = f"{name}:{text.line}"
    while True:
        try:
            value, end = _DECODER.raw_decode(text.text, text.place)
        except (ValueError, RecursionError) as error:
            end = _end_of(text.text, text.place)
            if end < 0 and not text.is_complete:
                text.more()
                continue
            return _broken_element(text, end, source, error)
        if end < len(text.text) or text.is_complete:
            text.move_to(end)
            return SourceRow(value, source)
        text.more()  # a number may go on


def _broken_element(text: _Arriving, end: int, source: str, error: Exception) -> BadRow:
    fault = _fault(error, source, text.place)
    if end >= 0:
        text.move_to(end)
        text.skip_space()
        if text.starts_with(",") or text.starts_with("]"):
            return fault
    raise UserError(f"{source}: {fault.detail}; what follows in the array cannot be read")


def _end_of(text: str, place: int) -> int:
    """Where the object or array that opens at `place` ends; -1 when the text ends before it."""
    depth = 0
    for token in _STRUCTURE.finditer(text, place):
        deeper = _DEEPER.get(token[0], 0)
        depth += deeper
        if deeper < 0 and depth <= 0:
            return token.end() if depth == 0 else -1
    return -1


def _several_on_a_line(text: str, source: str, error: Exception) -> list[SourceRow | BadRow]:
    """Rows one after another on one line, perhaps with commas behind them, as the lines of an array
    have; for anything else, the error of the whole line."""
    rows: list[SourceRow | BadRow] = []
    place = _end_of_space(text, 0)
    try:
        while place < len(text):
            value, place = _DECODER.raw_decode(text, place)
            if not isinstance(value, dict | list):
                raise ValueError("no row")
            rows.append(SourceRow(value, source))
            place = _end_of_space(text, place)
            if text.startswith(",", place):
                place = _end_of_space(text, place + 1)
    except (ValueError, RecursionError):
        return [_fault(error, source)]
    return rows


def _end_of_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    return match.end() if match else place


def _fault(error: Exception, source: str, start: int = 0) -> BadRow:
    """The fault of a JSON text; its position is counted from the start of the row."""
    what = str(error)
    if isinstance(error, json.JSONDecodeError):
        if (
            error.doc[: error.pos].rstrip().endswith(",")
            and error.doc[error.pos : error.pos + 1] in "}]"
        ):
            what = f"a comma before {error.doc[error.pos : error.pos + 1]!r}"
            return _not_json(source, f"{what} at character {error.pos - start + 1}; expected none")
        what = f"{error.msg.removesuffix(' at')} at character {error.pos - start + 1}"
    elif isinstance(error, _RepeatedKey):
        return BadRow(source, "repeated key", f"{error}; expected each key once")
    elif isinstance(error, RecursionError):
        what = "nested too deep"
    return _not_json(source, f"{what}; expected one JSON object")


def _not_json(source: str, what: str) -> BadRow:
    return BadRow(source, "not valid JSON", f"not valid JSON: {what}")
