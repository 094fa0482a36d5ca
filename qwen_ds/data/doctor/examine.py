"""The pass of the doctor: every row is read once, looked at by a process, and compared at the end.

Shapes: N conversations of all paths. A record is a source row, or a conversation that several
source rows gave; one record may give several conversations.
"""

from __future__ import annotations

import contextlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np

from qwen_ds.data.doctor import batch as look
from qwen_ds.data.doctor.answers import NO_FULL_STOP
from qwen_ds.data.doctor.batch import Checked, Numbers, TalkBatch
from qwen_ds.data.doctor.duplicates import Signatures, joined
from qwen_ds.data.doctor.endings import Endings
from qwen_ds.data.doctor.files import FileColumns
from qwen_ds.data.doctor.spans import Shown, texts_of
from qwen_ds.data.doctor.tally import FindingTally
from qwen_ds.data.pool import default_workers, process_pool
from qwen_ds.data.read.dialogue import (
    NO_ANSWER,
    NO_QUESTION,
    NO_TURNS,
    NOT_ALTERNATING,
    Dropped,
    Result,
)
from qwen_ds.data.read.sources import NotRead, ReadOptions, iter_conversations
from qwen_ds.model.tokenizer import Encoding

BATCH_ROWS = 2000
INLINE_BATCHES = 8  # one process looks at them in the seconds that it takes to start workers
AGAINST, EVAL, TRAIN = 0, 1, 2  # in the order in which they are read: the first keeps its place
Sides = Sequence[tuple[int, str]]  # (AGAINST, EVAL or TRAIN; path)

_DROPPED = {
    NO_ANSWER: "empty-answer",
    NO_QUESTION: "empty-question",
    NO_TURNS: "empty-question",
    NOT_ALTERNATING: "role-order",
    "unknown role": "role-order",
}
# What is said once for a file if all of its rows have it, and else row by row; and what needs the
# endings of all answers.
LATE = ("empty-answer", "empty-question", "swapped-columns", NO_FULL_STOP)
OnRecord = Callable[[int, object, Result], None]


@dataclass(slots=True)
class Pass:
    """All that a pass has gathered; see the top of the file for records and conversations."""

    tally: FindingTally
    files: list[tuple[int, FileColumns]]
    late: list[tuple[int, str, Shown]] = field(default_factory=list)
    """(record, kind, words) of the kinds in LATE."""
    record_N: array[int] = field(default_factory=lambda: array("q"))
    """The record of each conversation."""
    endings: Endings = field(default_factory=Endings)
    not_trained: Counter[str] = field(default_factory=Counter)
    not_read: NotRead = field(default_factory=dict)
    heads: list[tuple[int, str]] = field(default_factory=list)
    """(number of conversations, the beginnings of their questions, a line each)."""
    signatures: Signatures | None = None
    numbers: Numbers | None = None
    """None, as the signatures, where there is no conversation."""
    _signatures: list[Signatures] = field(default_factory=list)
    _numbers: list[Numbers] = field(default_factory=list)

    def take(self, checked: Checked, first: int) -> None:
        """Take the result for the conversations from number `first` on."""
        for found in checked.found:
            record = self.record_N[first + found.talk]
            self.note(found.kind, record, found.shown)
        self.endings.add(checked.endings)
        self.heads.append((len(checked.heads), "\n".join(checked.heads)))
        self._signatures.append(checked.signatures)
        self._numbers.append(checked.numbers)

    def note(self, kind: str, record: int, shown: Shown) -> None:
        """Take note of a finding in a record, of those in LATE until all rows are read."""
        if kind in LATE:
            self.late.append((record, kind, shown))
        else:
            self.tally.add(kind, record, shown)

    def finish(self) -> None:
        """Join the parts."""
        if self._signatures:
            self.signatures = joined(self._signatures)
            self.numbers = Numbers(*map(np.concatenate, zip(*self._numbers, strict=True)))
            self._numbers.clear()

    @property
    def file_N(self) -> np.ndarray:
        """The number of each conversation's path, int32 [N]."""
        return self.tally.places.files()[np.array(self.record_N, np.int64)]

    @property
    def side_N(self) -> np.ndarray:
        """AGAINST, EVAL or TRAIN for each conversation, int8 [N]."""
        return np.array([side for side, _ in self.files], np.int8)[self.file_N]

    def place(self, conversation: int) -> str:
        """The place of a conversation's record."""
        return self.tally.places.text(self.record_N[conversation])

    def head(self, conversation: int) -> str:
        """The beginning of a conversation's question."""
        for count, heads in self.heads:
            if conversation < count:
                return heads.split("\n")[conversation]
            conversation -= count
        raise IndexError(conversation)


def examine(
    sides: Sides,
    reading: ReadOptions,
    tally: FindingTally,
    encoding: Encoding | None = None,
    on_record: OnRecord | None = None,
    workers: int | None = None,
    most: int | None = None,
) -> Pass:
    """Read all rows of all paths, each once, and gather what is needed to judge them.

    Args:
        encoding: counts the tokens; None: they are estimated.
        on_record: called with each record's number, row (None: several rows gave it, or it could
            not be read) and first result, in order.
        workers: processes beside this one.
        most: so many records of each path are read; None: all.
    """
    files = [(side, FileColumns(path)) for side, path in sides]
    gathered = Pass(tally, files)
    talks = _talks(gathered, replace(reading, bad_rows="skip"), on_record, most)
    count = default_workers() if workers is None else workers
    look.start(encoding)
    with contextlib.ExitStack() as stack:
        pending: deque[tuple[Future[Checked], int]] = deque()
        submit = None
        for number, (batch, first) in enumerate(talks):
            if submit is None and count and number >= INLINE_BATCHES:
                submit = stack.enter_context(
                    process_pool(count, look.__name__, look.start, (encoding,))
                )
            future: Future[Checked] | None = None
            if submit and sum(not each.done() for each, _ in pending) < 2 * count:
                future = submit(look.check, batch)
            if future is None:
                future = Future()
                future.set_result(look.check(batch))
            pending.append((future, first))
            while pending and (pending[0][0].done() or len(pending) > 4 * count):
                checked, at = pending.popleft()
                gathered.take(checked.result(), at)
        for checked, at in pending:
            gathered.take(checked.result(), at)
    gathered.finish()
    return gathered


def _talks(
    gathered: Pass, reading: ReadOptions, on_record: OnRecord | None, most: int | None
) -> Iterator[tuple[TalkBatch, int]]:
    """Batches of conversations, with the number of the first; what gives none is counted here."""
    tally, first = gathered.tally, 0
    for file, (side, columns) in enumerate(gathered.files):
        talks: list[tuple[str, look.Turns]] = []
        seen: list[object] = []
        last: tuple[str, object] | None = None
        record, untold = -1, list[tuple[int, Dropped]]()
        not_read = {} if side == AGAINST else gathered.not_read
        for result, source in iter_conversations([columns.path], reading, None, not_read, seen):
            row = seen[0] if seen else None
            if columns.rows == most:
                break
            if last is None or last[0] != source or last[1] is not row or row is None:
                record = tally.places.add(source, file)
                # Only now it is known whether the record before shares its line.
                _note(gathered, untold)
                tally.grow()
                last = source, row
                columns.see(row, record)
                if on_record is not None:
                    on_record(record, row, result)
            if isinstance(result, Dropped):
                if side != AGAINST:
                    untold.append((record, result))
                continue
            talks.append(texts_of(result))
            gathered.record_N.append(record)
            if len(talks) == BATCH_ROWS:
                yield TalkBatch(talks, side != AGAINST), first
                first, talks = first + len(talks), []
        _note(gathered, untold)
        if talks:
            yield TalkBatch(talks, side != AGAINST), first
            first += len(talks)


def _note(gathered: Pass, untold: list[tuple[int, Dropped]]) -> None:
    """Take note of records without a conversation, and forget them."""
    for record, dropped in untold:
        gathered.not_trained[dropped.reason] += 1
        kind = "unreadable-row" if dropped.unreadable else "not-trainable"
        kind = _DROPPED.get(dropped.reason, kind)
        detail = f": {look.hidden(dropped.detail)}" if dropped.detail else ""
        gathered.note(kind, record, Shown(detail=f"{dropped.reason}{detail}"))
    untold.clear()
