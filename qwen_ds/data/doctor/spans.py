"""The talk that detectors look at, and the spans that they find in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from qwen_ds.model.chatml import Conversation


class Span(NamedTuple):
    """A place in a turn, with the kind of what was found there."""

    kind: str
    turn: int  # counted from 0, without the system turn; SYSTEM for that
    start: int
    end: int
    detail: str = ""


SYSTEM = -1


@dataclass(frozen=True, slots=True)
class Shown:
    """The words that show a finding: its place in the text, and details."""

    before: str = ""
    marked: str = ""
    after: str = ""
    detail: str = ""


# Words of a row about programs, markup or text processing, in which marks are the subject.
_OF_CODE = re.compile(
    r"代码|编程|程序|脚本|函数|变量|正则|转义|换行符|字符串|命令行|终端|网页|前端|标签|标记语言|爬虫|接口|"
    r"表达式|编译|数据库|分词器|词表|(?<![A-Za-z0-9_])(?:code|coding|program|script|function|regex|html|css|xml|json|yaml|"
    r"python|java|javascript|typescript|c\+\+|sql|shell|bash|linux|latex|markdown|jinja|tokenizer|escape)"
    r"|C语言|\bhello ?world\b",
    re.IGNORECASE,
)
# Code without a fence around it.
_BARE_CODE = re.compile(
    r"^[ \t]*#(?:include\s*[<\"]|define \w|ifdef \w|!/)|\b(?:int|void) main\s*\(|\bstd::\w"
    r"|\bpublic (?:static|class)\b|\{[^{}]{0,500};\s*\}|[)\w\]];[ \t]*\n[^{}]{0,500}\}",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Talk:
    """One conversation, and the classes of characters of each turn."""

    turns: tuple[tuple[str, str], ...]  # (role, text)
    classes: tuple[int, ...]
    system: str = ""
    system_classes: int = 0

    @property
    def pairs(self) -> Iterator[tuple[int, str, str]]:
        """(turn of the answer, the question before it, the answer)."""
        for turn in range(1, len(self.turns), 2):
            yield turn, self.turns[turn - 1][1], self.turns[turn][1]

    @property
    def texts(self) -> Iterator[tuple[int, str, int]]:
        """(turn, text, its classes) of each turn, and of the system text if there is one."""
        turns = zip(self.turns, self.classes, strict=True)
        for turn, ((_, text), classes) in enumerate(turns):
            yield turn, text, classes
        if self.system:
            yield SYSTEM, self.system, self.system_classes

    @cached_property
    def is_of_code(self) -> bool:
        """Whether the row speaks of code or markup, where marks are no leftovers."""
        return any(
            "```" in text or _OF_CODE.search(text) or is_bare_code(text)
            for _, text, _ in self.texts
        )


def is_bare_code(text: str) -> bool:
    """Whether a text holds code of C's family that no fence marks."""
    may_be = "#" in text or ("(" in text and ";" in text) or "{" in text or "::" in text
    return may_be and _BARE_CODE.search(text) is not None


def texts_of(talk: Conversation) -> tuple[str, tuple[tuple[str, str], ...]]:
    """(system text, turns) of a conversation, in plain values that go between processes."""
    return talk.system or "", tuple((turn.role, turn.text) for turn in talk.turns)


def any_of(words: str) -> str:
    """A pattern of words that are given with spaces between them; _ is a space in one."""
    return f"(?:{'|'.join(words.split()).replace('_', ' ')})"


Finder = Callable[[str], Iterator[tuple[int, int]]]
TalkFinder = Callable[[Talk], Iterator[Span]]


def pattern(text: str, flags: int = 0) -> Finder:
    """A finder of a pattern: its group `it` where that has matched, else all of it."""
    compiled = re.compile(text, flags)
    named = "it" in compiled.groupindex

    def find(text: str) -> Iterator[tuple[int, int]]:
        for match in compiled.finditer(text):
            if match[0]:
                yield match.span("it" if named and match["it"] else 0)

    return find


_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`|\$\$.+?\$\$|\$[^$\n]+\$", re.DOTALL)


def outside_code(text: str) -> str:
    """The text with code and formulas blanked, of equal length."""
    if "`" not in text and "$" not in text:
        return text
    return _CODE.sub(lambda match: " " * len(match[0]), text)


def has_any(text: str, words: Sequence[str]) -> bool:
    return any(word in text for word in words)
