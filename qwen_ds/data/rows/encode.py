"""Encoding of a conversation as a training row: token ids, and labels that mark its target tokens.

`learn_on` has three values. [..] are target tokens; # stands for <|im_start|>, / for <|im_end|> and
$ for <|endoftext|>:

    original   #system\\nS/\\n#user\\nQ/\\n#[assistant\\nA/]\\n#user\\nQ/\\n#[assistant\\nA/$]
    answer     #system\\nS/\\n#user\\nQ/\\n#assistant\\n[A/]\\n#user\\nQ/\\n#assistant\\n[A/$]
    official
    [#]system\\nS[/\\n#]user\\nQ[/\\n#]assistant\\n[A/\\n#]user\\nQ[/\\n#]assistant\\n[A/\\n]

original: the Qwen-SFT project's row, and its natural extension to several turns: every answer is
learnt as in a row of its own, and `$`, which ends a row, follows only the last. Questions are
stripped. `assistant\\n` and the answer are encoded as one text, so the line breaks that open an
answer merge with the one before it.
answer: only the tokens that the model itself writes after a prompt.
official: the labels of Qwen's own fine-tuning script, `#`, `/` and `\\n` of system and user turns
included. Such a row has no `$`, so a base model trained with it stops at `/`.

A turn that its row marks as not to be learnt (`Turn.learnt`) has no target under any of them.

A row that is too long is cut (see `encode_row`), and `Encoded` says so.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from qwen_ds.errors import UserError
from qwen_ds.model.chatml import (
    DEFAULT_SYSTEM,
    IGNORE,
    Conversation,
    Turn,
    footer_ids,
    header_ids,
    text_ids,
)
from qwen_ds.model.tokenizer import Encoding

LearnOn = Literal["original", "answer", "official"]
LEAST_ROOM = 16  # tokens that must be left for a question and its answer, or the row is dropped


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """How conversations become rows."""

    learn_on: LearnOn = "original"  # see the top of this file
    max_prompt_tokens: int = 254  # this and the next: bounds of single-turn rows under `original`
    max_answer_tokens: int = 254
    max_tokens: int | None = None  # bound of all other rows; None: no bound
    parse_specials: bool = False  # of control tokens spelled in a text (the old, unsafe behaviour)
    system: str | None = None  # text of conversations without one; None means DEFAULT_SYSTEM


@dataclass(frozen=True, slots=True)
class Encoded:
    """A training row. labels[i] is ids[i], or IGNORE if that is no target; the loss shifts them."""

    ids: list[int]
    labels: list[int]
    prompt_cut: bool = False  # the question lost its end
    answer_cut: bool = False  # the answer lost its end
    turns_dropped: int = 0  # number of turns that are not in the row
    dropped: str | None = None  # why there is no row (then ids and labels are empty)


@dataclass(frozen=True, slots=True)
class _Segment:
    """One turn in tokens: head + text + tail. A cut removes the end of the text and keeps the tail.

    A question keeps its `/\\n`. An answer's ending counts as text (n_tail 0), so a cut removes it.
    """

    ids: list[int]
    labels: list[int]
    n_head: int
    n_tail: int

    def cut(self, n_text: int) -> _Segment:
        """The segment with the first n_text tokens of its text, or all of them."""
        end = len(self.ids) - self.n_tail
        keep = min(self.n_head + n_text, end)
        ids, labels = (all_T[:keep] + all_T[end:] for all_T in (self.ids, self.labels))
        return _Segment(ids, labels, self.n_head, self.n_tail)

    @property
    def n_text(self) -> int:
        return len(self.ids) - self.n_head - self.n_tail


def encode_row(enc: Encoding, conversation: Conversation, options: EncodeOptions) -> Encoded:
    """Encode a conversation as a training row. No text raises: see `Encoded.dropped`.

    A single-turn row under `original` whose prompt and answer together have more than
    max_prompt_tokens + max_answer_tokens keeps the first max_prompt_tokens and max_answer_tokens of
    them, whose last tokens then become their tails: `/\\n#` and `/$`. (So a long prompt stays whole
    beside a short answer.)

    Any other row longer than max_tokens loses its oldest turns, a question with its answer at a
    time; the system turn stays. If the last question and answer alone are too long, each gets half
    of the room, and what one does not need goes to the other. A cut question keeps its tail. A cut
    answer just ends, so that the model does not learn to stop there; only under `original` it ends
    with `/$`, as single-turn rows do.

    A last question without an answer is left out. `official` leaves out a first answer without a
    question instead.
    """
    official = options.learn_on == "official"
    turns = conversation.turns
    if official and turns and turns[0].role == "assistant":
        turns = turns[1:]
    if not official and turns and turns[-1].role == "user":
        turns = turns[:-1]
    if not turns:
        return Encoded([], [], dropped="no answer" if conversation.turns else "no turns")
    roles = ("user", "assistant")
    if not official and any(turn.role != roles[i % 2] for i, turn in enumerate(turns)):
        return Encoded([], [], dropped="roles do not alternate")
    # A conversation's own system text comes first, then the options'.
    texts = conversation.system, options.system, DEFAULT_SYSTEM
    text = next(text for text in texts if text is not None)
    try:
        marks = official and conversation.system_learnt
        system = _system(enc, text, marks, options.parse_specials)
        segments = [
            _segment(enc, turn, options, is_last=i == len(turns)) for i, turn in enumerate(turns, 1)
        ]
    except UserError as error:  # an unknown role, a text that cannot be encoded
        return Encoded([], [], dropped=str(error))
    n_turns = len(conversation.turns)
    if options.learn_on == "original" and len(segments) == 2:
        return _original_single(enc, system, segments, n_turns, options)
    return _bounded(enc, system, segments, n_turns, options)


@lru_cache(maxsize=64)
def _system(enc: Encoding, text: str, markers: bool, parse_specials: bool) -> _Segment:
    """The system turn, cached since nearly all rows have the same one. Never mutate its lists."""
    return _unlearnt(enc, "system", text_ids(enc, text, parse_specials), markers)


def _unlearnt(enc: Encoding, role: str, text: list[int], markers: bool) -> _Segment:
    """A turn whose text is no target; with `markers` its control tokens and last line break are."""
    head, tail = header_ids(enc, role), footer_ids(enc)
    ids = [*head, *text, *tail]
    labels = [IGNORE] * len(ids)
    if markers:
        labels[0] = head[0]
        labels[-len(tail) :] = tail
    return _Segment(ids, labels, len(head), len(tail))


def _segment(enc: Encoding, turn: Turn, options: EncodeOptions, is_last: bool) -> _Segment:
    official = options.learn_on == "official"
    if turn.role == "user":
        text = turn.text.strip() if options.learn_on == "original" else turn.text
        marks = official and turn.learnt
        return _unlearnt(enc, "user", text_ids(enc, text, options.parse_specials), marks)
    if turn.role != "assistant":
        raise UserError(f"role is {turn.role!r}; expected user or assistant")
    head, text = header_ids(enc, "assistant"), turn.text
    if options.learn_on == "original":
        # The rest of the header is a target, and one text with the answer.
        head, text = head[:1], f"assistant\n{text}"
    answer = [*text_ids(enc, text, options.parse_specials), enc.im_end_id]
    end = enc.eod_id if is_last and not official else footer_ids(enc)[1]
    last_label = end if is_last or official else IGNORE
    labels = [IGNORE] * len(head) + [*answer, last_label]
    if official:
        labels[0] = head[0]
    if not turn.learnt:
        labels = [IGNORE] * len(labels)
    return _Segment([*head, *answer, end], labels, len(head), 0)


def _original_single(
    enc: Encoding, system: _Segment, segments: list[_Segment], n_turns: int, options: EncodeOptions
) -> Encoded:
    question, answer = segments
    x = [*system.ids, *question.ids, enc.im_start_id]
    y, is_learnt = answer.ids[1:], answer.labels[-1] != IGNORE
    n_x, n_y = options.max_prompt_tokens, options.max_answer_tokens
    too_long = len(x) + len(y) > n_x + n_y
    prompt_cut, answer_cut = too_long and len(x) > n_x, too_long and len(y) > n_y
    if prompt_cut:
        x[n_x - 3 :] = [*footer_ids(enc), enc.im_start_id]
    if answer_cut:
        y[n_y - 2 :] = [enc.im_end_id, enc.eod_id]
    labels = [IGNORE] * len(x) + (y if is_learnt else [IGNORE] * len(y))
    return Encoded(x + y, labels, prompt_cut, answer_cut, n_turns - 2)


def _bounded(
    enc: Encoding, system: _Segment, segments: list[_Segment], n_turns: int, options: EncodeOptions
) -> Encoded:
    """The row within max_tokens: first the oldest turns go, then the last two are cut."""
    is_cut = [False]
    room = sys.maxsize if options.max_tokens is None else options.max_tokens - len(system.ids)
    while len(segments) > 2 and _n_tokens(segments) > room:
        segments = segments[2:]
    if _n_tokens(segments) > room:
        room -= sum(segment.n_head + segment.n_tail for segment in segments)
        if room < LEAST_ROOM:
            no_room = "the system text leaves no room within data.max_tokens"
            return Encoded([], [], dropped=no_room)
        shares = _share(room, [segment.n_text for segment in segments])
        is_cut = [segment.n_text > share for segment, share in zip(segments, shares, strict=True)]
        segments = [segment.cut(share) for segment, share in zip(segments, shares, strict=True)]
        if any(is_cut[1:]) and options.learn_on == "original":
            end, is_learnt = [enc.im_end_id, enc.eod_id], segments[1].labels[-1] != IGNORE
            segments[1].ids[-2:] = end
            segments[1].labels[-2:] = end if is_learnt else [IGNORE] * 2
    ids, labels = list(system.ids), list(system.labels)
    for segment in segments:
        ids += segment.ids
        labels += segment.labels
    return Encoded(ids, labels, is_cut[0], any(is_cut[1:]), n_turns - len(segments))


def _n_tokens(segments: list[_Segment]) -> int:
    return sum(len(segment.ids) for segment in segments)


def _share(room: int, wanted: list[int]) -> list[int]:
    """Tokens for each of one or two texts that together want more than the room."""
    first = min(wanted[0], max(room // 2, room - sum(wanted[1:])))
    return [first, room - first][: len(wanted)]
