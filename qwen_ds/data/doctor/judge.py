"""Findings that only all rows together show: duplicates, groups, columns, limits, lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from qwen_ds.data.doctor.answers import NO_FULL_STOP
from qwen_ds.data.doctor.batch import Numbers
from qwen_ds.data.doctor.duplicates import Signatures, first_with, groups, repeats
from qwen_ds.data.doctor.examine import AGAINST, TRAIN, Pass
from qwen_ds.data.doctor.files import LEAST_ROWS
from qwen_ds.data.doctor.limits import Cuts, cuts
from qwen_ds.data.doctor.spans import Shown
from qwen_ds.data.doctor.tally import EXAMPLES
from qwen_ds.recipe.options import DataOptions

MANY_QUESTIONS = 3  # with one answer
LEAST_ANSWER = 4  # tokens: shorter ones, such as a class, are shared by many questions
MOST = 0.5  # the share of a file's rows from which on a fault is the column's
LONG, TIMES = 2000, 10  # characters, and times the 95th percentile


def judge(gathered: Pass, data: DataOptions, seq_length: int | None) -> list[Cuts]:
    """Add the findings that need all rows; returns what the limits on lengths cut."""
    _columns(gathered, gathered.file_N)
    if gathered.signatures is None or gathered.numbers is None:
        return []
    side_N = gathered.side_N
    _repeats(gathered, gathered.signatures, side_N)
    own = np.flatnonzero(side_N == TRAIN)
    _groups(gathered, gathered.signatures, gathered.numbers, own)
    _lengths(gathered, gathered.signatures, gathered.numbers, side_N)
    return _limits(gathered, gathered.numbers, own, data, seq_length)


def _columns(gathered: Pass, file_N: np.ndarray) -> None:
    """Empty, constant and swapped columns, once a file; else their rows one by one."""
    tally, files = gathered.tally, gathered.tally.places.files()
    said_once: set[tuple[int, str]] = set()
    for file, (side, columns) in enumerate(gathered.files):
        if side == AGAINST:
            continue
        mine = file_N == file
        faults = [*_faults(gathered, file, mine)]
        for place, (kind, what) in enumerate(faults):
            shown = Shown(detail=f"{what} in all {columns.rows:,} rows of {columns.path}")
            is_first = all(kind != known for known, _ in faults[:place])
            tally.add_file(kind, columns.rows if is_first else 0, columns.first, shown)
            if kind == "empty-column":
                said_once |= {(file, "empty-answer"), (file, "empty-question")}
        if (count := _swapped(gathered, mine)) is not None:
            said_once.add((file, "swapped-columns"))
            shown = Shown(detail=f"question and answer look swapped in {columns.path}")
            tally.add_file("swapped-columns", count, columns.first, shown)
    for record, kind, shown in gathered.late:
        if kind == NO_FULL_STOP:
            if gathered.endings.is_cut(shown.marked[-2:]):
                tally.add("answer-cut-midway", record, shown)
        elif (files[record], kind) not in said_once:
            tally.add(kind, record, shown)


def _faults(gathered: Pass, file: int, mine: np.ndarray) -> Iterator[tuple[str, str]]:
    """(kind, what is wrong) of each column of a file that is empty or constant."""
    kinds = set()
    for kind, column in gathered.files[file][1].faults():
        kinds.add(kind)
        yield kind, f"{column} {'is empty' if kind == 'empty-column' else 'is the same'}"
    for kind, what in _constant(gathered, mine):
        if kind not in kinds:
            yield kind, what


def _constant(gathered: Pass, mine: np.ndarray) -> Iterator[tuple[str, str]]:
    """Questions or answers that are the same throughout a file, whatever its format. `mine` is
    bool [N]: the conversations of the file."""
    found = gathered.signatures
    if found is None:
        return
    for name, hash_N in (("the question", found.asked_N), ("the answer", found.said_N)):
        here = hash_N[mine]
        if len(here) >= LEAST_ROWS and (here == here[0]).all():
            yield "constant-column", f"{name} is the same"


def _swapped(gathered: Pass, mine: np.ndarray) -> int | None:
    """The rows of a file whose columns look swapped, None if those of the file are not."""
    if gathered.numbers is None:
        return None
    looks = gathered.numbers.swapped_N[mine]
    swapped, right = int((looks > 0).sum()), int((looks < 0).sum())
    return len(looks) if swapped > 4 * right and swapped >= max(3, MOST * len(looks)) else None


def _repeats(gathered: Pass, found: Signatures, side_N: np.ndarray) -> None:
    record_N = gathered.record_N
    for repeat in repeats(found):
        at, of = repeat.at, repeat.of
        if side_N[at] == AGAINST or record_N[at] == record_N[of]:
            continue
        if side_N[of] == AGAINST:
            kind = "near-duplicate-test-set" if repeat.near else "duplicate-test-set"
        elif side_N[of] != side_N[at]:
            kind = "near-duplicate-train-eval" if repeat.near else "duplicate-train-eval"
        else:
            kind = "near-duplicate" if repeat.near else "exact-duplicate"
        detail = f"{'nearly ' if repeat.near else ''}the same as {gathered.place(of)}"
        _add(gathered, kind, at, detail)
    # A question of a test set among the training rows, whatever its answer there.
    first_N = first_with(found.asked_N)
    for at in np.flatnonzero((side_N == TRAIN) & (side_N[first_N] != TRAIN)).tolist():
        of = int(first_N[at])
        kind = "duplicate-test-set" if side_N[of] == AGAINST else "duplicate-train-eval"
        _add(gathered, kind, at, f"asks what {gathered.place(of)} asks")


def _add(gathered: Pass, kind: str, conversation: int, detail: str) -> None:
    examples = gathered.tally.examples.get(kind, ())
    head = gathered.head(conversation) if len(examples) < EXAMPLES else ""
    record = gathered.record_N[conversation]
    gathered.tally.add(kind, record, Shown(marked=head, detail=detail))


def _groups(gathered: Pass, found: Signatures, numbers: Numbers, own: np.ndarray) -> None:
    asked_N, said_N = found.asked_N[own], found.said_N[own]
    first_N = first_with(asked_N)
    for place in groups(asked_N, said_N, least=2).tolist():
        if first_N[place] != place:
            at, of = int(own[place]), int(own[first_N[place]])
            kind = "same-question-different-answers"
            _add(gathered, kind, at, f"asks what {gathered.place(of)} asks")
    long = own[numbers.said_tokens_N[own] >= LEAST_ANSWER]
    said_N = found.said_N[long]
    shared = groups(said_N, found.asked_N[long], least=MANY_QUESTIONS).tolist()
    times = Counter(said_N[shared].tolist())
    first_N = first_with(said_N)
    for place in shared:
        at, of = int(long[place]), int(long[first_N[place]])
        first = gathered.place(of)
        detail = f"the answer of {times[int(said_N[place])]} rows, the first {first}"
        _add(gathered, "same-answer-many-questions", at, detail)


def _lengths(gathered: Pass, found: Signatures, numbers: Numbers, side_N: np.ndarray) -> None:
    file_N = gathered.file_N
    sides = {"question": numbers.asked_chars_N, "answer": found.said_chars_N}
    for file in np.unique(file_N[side_N != AGAINST]).tolist():
        mine = np.flatnonzero(file_N == file)
        for name, chars_N in sides.items():
            low, middle, high = np.percentile(chars_N[mine], [5, 50, 95])
            extreme = chars_N[mine] > max(LONG, TIMES * high)
            # A character or two where nearly all have dozens.
            extreme |= (chars_N[mine] <= 2) & (low >= 20)
            for at in mine[extreme].tolist():
                count = f"{chars_N[at]:,} characters"
                detail = f"{name} of {count}; half of the file's have at most {middle:,.0f}"
                _add(gathered, "extreme-length", at, detail)


def _limits(
    gathered: Pass, numbers: Numbers, own: np.ndarray, data: DataOptions, seq_length: int | None
) -> list[Cuts]:
    asked_N, said_N, turns_N = numbers.asked_tokens_N, numbers.said_tokens_N, numbers.turns_N
    found = cuts(data, seq_length, asked_N[own], said_N[own], turns_N[own])
    advice = []
    for each in found:
        if not each.is_cut_N.any():
            continue
        advice.append(each.advice)
        for at in own[each.is_cut_N].tolist():
            detail = f"{asked_N[at]:,} + {said_N[at]:,} tokens, {each.option} {each.value}"
            _add(gathered, "cut-by-limit", at, detail)
    if advice:
        gathered.tally.advice["cut-by-limit"] = "; ".join(advice)
    return found
