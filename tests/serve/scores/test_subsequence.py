"""Longest common subsequences, against the whole table of lengths."""

from __future__ import annotations

import random
import tracemalloc

from serve.scores.subsequence import common_length, common_subsequence


def table_of_lengths(reference: list[str], prediction: list[str]) -> list[list[int]]:
    table = [[0] * (len(prediction) + 1) for _ in range(len(reference) + 1)]
    for i, left in enumerate(reference, 1):
        for j, right in enumerate(prediction, 1):
            longest = max(table[i - 1][j], table[i][j - 1])
            table[i][j] = table[i - 1][j - 1] + 1 if left == right else longest
    return table


def walked_back(reference: list[str], prediction: list[str]) -> list[str]:
    """The subsequence that the package `rouge` 1.0.1 finds, by the whole table."""
    table, found = table_of_lengths(reference, prediction), []
    i, j = len(reference), len(prediction)
    while i and j:
        if reference[i - 1] == prediction[j - 1]:
            i, j = i - 1, j - 1
            found.append(reference[i])
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def test_the_subsequence_is_the_one_that_a_walk_through_the_whole_table_finds() -> None:
    draw = random.Random(7)
    for _ in range(600):
        words = "abcdefgh"[: draw.randint(1, 8)]
        left, right = (draw.choices(words, k=draw.randint(0, 40)) for _ in "12")
        assert common_subsequence(left, right) == walked_back(left, right)
        assert common_length(left, right) == table_of_lengths(left, right)[-1][-1]
    often, seldom = ["a", "b"] * 100, [draw.choice("abcd") for _ in range(150)]
    assert common_subsequence(seldom, often) == walked_back(seldom, often)


def test_answers_of_20_000_words_take_little_memory() -> None:
    draw = random.Random(7)
    texts = [" ".join(str(draw.randint(0, 20_000)) for _ in range(20_000)) for _ in "12"]
    words = [text.split() for text in texts]
    tracemalloc.start()
    try:
        assert common_length(*words) == len(common_subsequence(*words))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6, f"{peak} bytes; a table of 20,000 by 20,000 takes 1.6e9"
