"""Equal and nearly equal conversations: which are found, and which are only alike."""

from __future__ import annotations

import random

import numpy as np
import pytest

from qwen_ds.data.doctor import duplicates
from qwen_ds.data.doctor.duplicates import Repeat, first_with, groups, joined, repeats, signatures

CHARS = [
    bytes((lead, trail)).decode("gb2312")
    for lead in range(0xB0, 0xC0)
    for trail in range(0xA1, 0xFF)
]


def text(size: int, seed: int) -> str:
    return "".join(random.Random(seed).choices(CHARS, k=size))


def found(*rows: tuple[str, str]) -> list[Repeat]:
    return list(repeats(signatures(rows)))


def test_white_space_makes_no_difference_and_a_word_does() -> None:
    row = (text(10, 1), text(40, 2))
    assert found(row, (f" {row[0]}\n", f"{row[1][:5]} {row[1][5:]}")) == [Repeat(1, 0, near=False)]
    assert found(row, (row[0], text(40, 3))) == []


@pytest.mark.parametrize("size", (20, 60, 400))
def test_a_changed_word_leaves_a_near_duplicate(size: int) -> None:
    hits = 0
    for seed in range(40):
        asked, said = text(12, seed), text(size, seed + 100)
        changed = f"{said[: size // 2]}{text(1, seed + 200)}{said[size // 2 + 1 :]}，"
        hits += found((asked, said), (asked, changed)) == [Repeat(1, 0, near=True)]
    assert hits >= 38, "a MinHash is an estimate"


def test_one_side_alone_makes_no_duplicate() -> None:
    """A long passage with several questions, and one answer for several: both are meant so."""
    passage, answer = text(300, 1), text(300, 2)
    assert found((passage, text(30, 3)), (passage, text(30, 4))) == []
    assert found((text(30, 5), answer), (text(30, 6), answer)) == []


def test_other_numbers_are_another_task() -> None:
    asked, said = text(40, 1), text(60, 2)
    assert found((f"{asked}12+35", said), (f"{asked}12+36", said)) == []
    assert len(found((f"{asked}12+35", said), (f"{asked}，12+35", said))) == 1


def test_another_number_is_another_task_unless_the_question_is_the_same() -> None:
    asked, said = text(20, 1), text(90, 2)
    assert found((asked, f"{said}12"), (asked, f"{said}13")) == [Repeat(1, 0, near=True)]
    assert found((f"{asked}7", f"{said}12"), (f"{asked}8", f"{said}13")) == []


def test_many_copies_all_refer_to_the_first() -> None:
    row = (text(10, 1), text(50, 2))
    other = (text(10, 3), text(50, 4))
    rows = [other, row, row, (row[0], row[1] + "呢"), row]
    assert found(*rows) == [Repeat(2, 1, False), Repeat(4, 1, False), Repeat(3, 1, True)]


def test_unrelated_rows_are_not_alike() -> None:
    rows = [(text(20, 2 * seed), text(80, 2 * seed + 1)) for seed in range(500)]
    assert found(*rows) == []


def test_texts_without_words_and_halves_of_characters_pass() -> None:
    assert found(("", "。。。"), ("？", "\ud800"), ("", "")) == []
    assert first_with(np.empty(0, np.uint64)).tolist() == []
    assert groups(np.empty(0, np.uint64), np.empty(0, np.uint64), 2).tolist() == []


def test_parts_join_to_what_one_look_finds() -> None:
    rows = [(text(20, seed % 7), text(80, seed % 7)) for seed in range(20)]
    parts = joined([signatures(rows[:5]), signatures(rows[5:])])
    for part, whole in zip(parts, signatures(rows), strict=True):
        assert np.array_equal(part, whole)
    assert list(repeats(parts)) == found(*rows)


def test_memory_of_a_conversation_is_a_few_numbers() -> None:
    made = signatures([(text(20, seed), text(80, seed)) for seed in range(10)])
    assert sum(part.nbytes for part in made) / 10 <= 230
    assert duplicates.WHOLE % duplicates.BAND == 0
