"""A batch of conversations, and everything that one look at it tells: the work of a process.

Shapes: N conversations of a batch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qwen_ds.data.doctor.characters import classes_of
from qwen_ds.data.doctor.columns import looks_swapped
from qwen_ds.data.doctor.detectors import found_in
from qwen_ds.data.doctor.duplicates import Signatures, signatures
from qwen_ds.data.doctor.endings import Endings
from qwen_ds.data.doctor.kinds import MASKED
from qwen_ds.data.doctor.personal import masked, places
from qwen_ds.data.doctor.spans import SYSTEM, Shown, Span, Talk
from qwen_ds.model.chatml import text_ids
from qwen_ds.model.tokenizer import Encoding

AROUND, LONGEST_MARK, HEAD = 24, 60, 20  # characters that are shown
LONGEST_PERSONAL = 300  # characters: what begins in a head is seen whole
_MAY_BE_PERSONAL = re.compile("[0-9A-Za-z０-９Ａ-Ｚａ-ｚ]")
# Tokens of a Chinese character and of a byte of anything else, fitted on instruction rows under
# Qwen's vocabulary; good to a tenth for a data set, not for a single row.
TOKENS_A_WIDE, TOKENS_A_BYTE = 0.68, 0.27

Turns = tuple[tuple[str, str], ...]


class TalkBatch(NamedTuple):
    """Conversations as (system text, turns)."""

    talks: list[tuple[str, Turns]]
    detect: bool = True  # False: only compared with others, as test sets are


class Found(NamedTuple):
    """One kind of finding in one conversation, with the first place that has it."""

    talk: int
    kind: str
    shown: Shown


class Numbers(NamedTuple):
    """Figures of each conversation, beside its signature."""

    asked_chars_N: np.ndarray  # int32, all before the last answer
    asked_tokens_N: np.ndarray  # int32, the same, without the marks of ChatML
    said_tokens_N: np.ndarray  # int32, the last answer
    turns_N: np.ndarray  # int32
    swapped_N: np.ndarray  # int8: 1 question and answer look swapped, -1 they look right, 0 unclear


@dataclass(slots=True)
class Checked:
    """The result for a batch."""

    found: list[Found]
    signatures: Signatures
    heads: list[str]  # beginnings of the questions
    numbers: Numbers
    endings: Endings  # of the answers


_encoding: Encoding | None = None


def start(encoding: Encoding | None) -> None:
    """Tell this process whose tokens to count; without a vocabulary they are estimated."""
    global _encoding
    _encoding = encoding


def check(batch: TalkBatch) -> Checked:
    """Look at each conversation, and make the numbers by which they are compared."""
    talks = batch.talks
    sides = [_sides(system, turns) for system, turns in talks]
    found = _detect(talks) if batch.detect else []
    endings = Endings()
    if batch.detect:
        endings.see(answer for _, answer in sides)
    numbers = Numbers(
        asked_chars_N=np.array([len(asked) for asked, _ in sides], np.int32),
        asked_tokens_N=_tokens([asked for asked, _ in sides]),
        said_tokens_N=_tokens([said for _, said in sides]),
        turns_N=np.array([len(turns) for _, turns in talks], np.int32),
        swapped_N=np.array([looks_swapped(*side) for side in sides], np.int8),
    )
    heads = [head(turns[0][1]) for _, turns in talks]
    return Checked(found, signatures(sides), heads, numbers, endings)


def head(text: str) -> str:
    """The beginning of a text in one line, masked before it is cut: half a number is no number, and
    tells as much."""
    if not _MAY_BE_PERSONAL.search(text[:HEAD]):
        return without_lines(text[:HEAD])
    return without_lines(hidden(text[: HEAD + LONGEST_PERSONAL])[:HEAD])


def hidden(text: str, private: Iterable[tuple[int, int]] | None = None) -> str:
    """A text of equal length, its personal data masked: at known places, or all there are."""
    if private is None:
        private = [(start, end) for _, start, end in places(text)]
    for start, end in private:
        text = text[:start] + masked(text[start:end]) + text[end:]
    return text


def _sides(system: str, turns: Turns) -> tuple[str, str]:
    """(all before the last answer, the last answer)."""
    before = [text for _, text in turns[:-1]]
    return "\n".join([system, *before] if system else before), turns[-1][1]


def _tokens(texts: Sequence[str]) -> np.ndarray:
    if _encoding is not None:
        return np.array([len(text_ids(_encoding, text, False)) for text in texts], np.int32)
    chars = np.array([len(text) for text in texts])
    raw = np.array([len(text.encode("utf-8", "surrogatepass")) for text in texts])
    wide = (raw - chars) // 2  # a Chinese character has three bytes
    return np.ceil(TOKENS_A_WIDE * wide + TOKENS_A_BYTE * (chars - wide)).astype(np.int32)


def _detect(talks: Sequence[tuple[str, Turns]]) -> list[Found]:
    texts = [text for system, turns in talks for text in (system, *(text for _, text in turns))]
    classes = classes_of(texts)
    found: list[Found] = []
    at = 0
    for place, (system, turns) in enumerate(talks):
        mine = tuple(classes[at : at + len(turns) + 1])
        at += len(turns) + 1
        talk = Talk(turns, mine[1:], system, mine[0])
        spans = list(found_in(talk))
        if spans:
            found += excerpts(place, talk, spans)
    return found


def excerpts(place: int, talk: Talk, spans: Sequence[Span]) -> list[Found]:
    """One Found for each kind: its first place with the text around it. All personal data in the
    turn are masked, whatever the kind."""
    firsts: dict[str, Span] = {}
    for span in spans:
        firsts.setdefault(span.kind, span)
    times = Counter(span.kind for span in spans)
    private = [span for span in spans if span.kind in MASKED]
    found = []
    for kind, span in firsts.items():
        text = talk.system if span.turn == SYSTEM else talk.turns[span.turn][1]
        text = hidden(text, ((each.start, each.end) for each in private if each.turn == span.turn))
        role = "system" if span.turn == SYSTEM else talk.turns[span.turn][0]
        where = f"turn {span.turn + 1}, {role}" if len(talk.turns) > 2 else role
        count = f", {times[kind]} places" if times[kind] > 1 else ""
        shown = Shown(
            without_lines(text[max(0, span.start - AROUND) : span.start]),
            without_lines(shortened(text[span.start : span.end])),
            without_lines(text[span.end : span.end + AROUND]),
            f"{where}{count}{f': {span.detail}' if span.detail else ''}",
        )
        found.append(Found(place, kind, shown))
    return found


def shortened(text: str) -> str:
    half = LONGEST_MARK // 2
    return text if len(text) <= LONGEST_MARK else f"{text[:half]} … {text[-half:]}"


def without_lines(text: str) -> str:
    return text.replace("\r", "").replace("\n", "⏎")
