"""Text on a terminal: shown, never obeyed.

Rows, file names, model outputs and error messages may hold escape sequences, which a terminal would
act on, and marks that reorder what is read. `visible` spells them; `show` is the only way to print
(tests/test_structure.py). `guard` holds back what libraries print.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterable
from types import TracebackType
from typing import TextIO

from qwen_ds.errors import UserError
from qwen_ds.streams import Lossy, outlive_readers

# C0 but line feed and tab, DEL and C1; marks of direction; line separators; surrogates; characters
# without a form: joiners stay, since emoji and several scripts are written with them.
_CONTROL = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
_ACTS = (
    r"\u061c\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e007f"
)
_UNSAFE = re.compile(f"[{_CONTROL}{_ACTS}]")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
# What tqdm and rich send to move in a line and to colour it. Anything else is spelled.
_BY_LIBRARIES = re.compile(rf"(\r|\x1b\[A|\x1b\[[0-9;]*[mK])|[{_CONTROL}{_ACTS}]")


def _spelled(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20 or code == 0x7F:  # these have pictures: ESC is U+241B
        return chr(0x2421 if code == 0x7F else 0x2400 + code)
    return match[0].encode("ascii", "backslashreplace").decode()


def visible(text: object) -> str:
    """The text with everything that a terminal would act on as a picture (U+241B for escape) or
    spelled (\\u202e); line feeds and tabs stay."""
    return _UNSAFE.sub(_spelled, str(text))


def one_line(text: object) -> str:
    """The text as `visible`, and with pictures of its line feeds, too."""
    return visible(text).replace("\n", "\u240a")


def json_text(text: str) -> str:
    """JSON for a terminal: the same value, with the same characters spelled as JSON spells them."""
    return _UNSAFE.sub(_as_json, text)


def _as_json(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def show(*texts: object, err: bool = False, end: str = "\n", sep: str = " ") -> None:
    """Print to stdout, or stderr: `visible`, at once, and whatever the stream can encode. `end` is
    sent as it is."""
    stream = sys.stderr if err else sys.stdout
    stream.write(_encodable(sep.join(map(visible, texts)) + end, stream))
    stream.flush()


def require_stdout() -> None:
    """Raise UserError if standard output was closed when this process began."""
    if sys.__stdout__ is None:
        raise UserError("standard output is closed, and the result goes there; expected --output")


def show_json(lines: Iterable[str]) -> None:
    """Print JSON lines, such as rows that another program reads, to stdout, as long as it does.

    What the stream cannot encode is spelled as JSON spells it. A full disk is an OSError: these
    lines are the result, and not only words about it. UserError as `require_stdout`.
    """
    require_stdout()
    stream = sys.stdout
    try:
        if not isinstance(stream, Lossy):
            _write_json(lines, stream)
            return
        stream.flush()
        with open(os.dup(stream.fileno()), "w", encoding=stream.encoding) as out:
            _write_json(lines, out)
    except BrokenPipeError:
        # A reader such as `head` has closed the pipe: the flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _write_json(lines: Iterable[str], stream: TextIO) -> None:
    encoding = stream.encoding or "utf-8"
    for line in lines:
        text = json_text(line) + "\n"
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            text = _NOT_ASCII.sub(_as_json, text)
        stream.write(text)
    stream.flush()


def overwrite_line(text: str, width: int) -> None:
    """Replace the line that the cursor is in; `width` is that of what stands there."""
    sys.stdout.write(_encodable("\r" + " " * width + "\r" + visible(text), sys.stdout))
    sys.stdout.flush()


def _encodable(text: str, stream: TextIO) -> str:
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class _Guarded(Lossy):
    """A stream on which libraries' own control sequences pass, and no others."""

    def write(self, text: str) -> int:
        super().write(_BY_LIBRARIES.sub(lambda m: m[0] if m[1] else _spelled(m), text))
        return len(text)


def guard() -> None:
    """Let stdout and stderr of this process spell what acts, whoever prints, and never fail; the
    traceback of an error is printed so, too."""
    outlive_readers(_Guarded)
    sys.excepthook = _show_traceback


def _show_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    show("".join(traceback.format_exception(kind, error, trace)), err=True, end="")
