"""A batch of conversations, and everything that one look at it tells: the work of a process.

Shapes: N conversations of a batch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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
from qwen_ds.data.doctor.spans import SYSTEM, Span, Talk
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
    before: str
    marked: str
    after: str
    detail: str


@dataclass(slots=True)
class Checked:
    """The result for a batch."""

    found: list[Found]
    signatures: Signatures
    heads: list[str]  # beginnings of the questions
    asked_chars_N: np.ndarray  # int32
    asked_tokens_N: np.ndarray  # int32, all before the last answer, without the marks of ChatML
    said_tokens_N: np.ndarray  # int32, the last answer
    turns_N: np.ndarray  # int32
    endings: Endings  # of the answers
    swapped_N: np.ndarray  # int8: 1 question and answer look swapped, -1 they look right, 0 unclear


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
    return Checked(
        found,
        signatures(sides),
        [head(turns[0][1]) if turns else "" for _, turns in talks],
        asked_chars_N=np.array([len(asked) for asked, _ in sides], np.int32),
        asked_tokens_N=_tokens([asked for asked, _ in sides]),
        said_tokens_N=_tokens([said for _, said in sides]),
        turns_N=np.array([len(turns) for _, turns in talks], np.int32),
        endings=endings,
        swapped_N=np.array([looks_swapped(*side) for side in sides], np.int8),
    )


def head(text: str) -> str:
    """The beginning of a text in one line, masked before it is cut: half a number is no number, and
    tells as much."""
    if not _MAY_BE_PERSONAL.search(text[:HEAD]):
        return without_lines(text[:HEAD])
    return without_lines(hidden(text[: HEAD + LONGEST_PERSONAL])[:HEAD])


def hidden(text: str) -> str:
    """A text of equal length, its personal data masked."""
    for _, start, end in list(places(text)):
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
    times: dict[str, int] = {}
    for span in spans:
        firsts.setdefault(span.kind, span)
        times[span.kind] = times.get(span.kind, 0) + 1
    found = []
    for kind, span in firsts.items():
        text = talk.system if span.turn == SYSTEM else talk.turns[span.turn][1]
        for hidden in spans:
            if hidden.turn == span.turn and hidden.kind in MASKED:
                text = (
                    text[: hidden.start]
                    + masked(text[hidden.start : hidden.end])
                    + text[hidden.end :]
                )
        role = "system" if span.turn == SYSTEM else talk.turns[span.turn][0]
        where = f"turn {span.turn + 1}, {role}" if len(talk.turns) > 2 else role
        count = f", {times[kind]} places" if times[kind] > 1 else ""
        found.append(
            Found(
                place,
                kind,
                without_lines(text[max(0, span.start - AROUND) : span.start]),
                without_lines(shortened(text[span.start : span.end])),
                without_lines(text[span.end : span.end + AROUND]),
                f"{where}{count}{f': {span.detail}' if span.detail else ''}",
            )
        )
    return found


def shortened(text: str) -> str:
    half = LONGEST_MARK // 2
    return text if len(text) <= LONGEST_MARK else f"{text[:half]} … {text[-half:]}"


def without_lines(text: str) -> str:
    return text.replace("\r", "").replace("\n", "⏎")
