"""Longest common subsequences of word lists, a row of the table in one integer: a pair of 2,000
words takes milliseconds, where the packages' own tables take seconds or overflow the stack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isqrt


def common_subsequence(
    reference: Sequence[str], prediction: Sequence[str], places: WordPlaces | None = None
) -> list[str]:
    """One longest common subsequence of two word lists, last words first.

    `places` are those of the prediction, where it is compared with several references.

    It matters which of several equally long ones is found, since ROUGE-L counts the set of its
    words: on a tie the walk back from the end skips the prediction's word.
    """
    matches = places or WordPlaces(prediction)
    # Of the table every step-th row is kept; those between are made again on the way back.
    step = isqrt(len(reference)) + 1
    kept = [_all_ones(len(prediction))]
    for start in range(0, len(reference), step):
        kept.append(_steps(kept[-1], reference[start : start + step], matches, len(prediction))[-1])
    found: list[str] = []
    i, j, first = len(reference), len(prediction), len(reference)
    rows: list[int] = []
    while i and j:
        if i <= first:
            block = (i - 1) // step
            first = block * step
            rows = _steps(kept[block], reference[first:i], matches, len(prediction))
        if reference[i - 1] == prediction[j - 1]:
            i, j = i - 1, j - 1
            found.append(reference[i])
        # If the words differ, L[i,j] is the larger of L[i-1,j] and L[i,j-1]; so the first is larger
        # than the second just where L rises at j.
        elif not rows[i - first - 1] >> (j - 1) & 1:
            i -= 1
        else:
            j -= 1
    return found


def common_length(reference: Sequence[str], prediction: Sequence[str]) -> int:
    """The length of the longest common subsequences of two word lists."""
    width = len(prediction)
    if not reference or not width:
        return 0
    matches, row = WordPlaces(prediction), _all_ones(width)
    for word in reference:
        row = _next_row(row, matches.of(word), width)
    return width - row.bit_count()


def _all_ones(width: int) -> int:
    return (1 << width) - 1


# Up to so many words the bits of all are kept: half a megabyte.
_SHORT = 2048


class WordPlaces:
    """The places of each word in a list, as bits. In a long list those of rare words are made when
    asked for: kept, they would take the square of the list's length."""

    def __init__(self, words_M: Sequence[str]) -> None:
        self._bytes = len(words_M) // 8 + 1
        self._places: dict[str, list[int]] = {}
        for at, word in enumerate(words_M):
            self._places.setdefault(word, []).append(at)
        seldom = 0 if len(words_M) <= _SHORT else 64
        self._kept = {
            word: self._bits(places)
            for word, places in self._places.items()
            if len(places) > seldom
        }

    def of(self, word: str) -> int:
        """A bit for each place of a word: bit k for place k."""
        kept = self._kept.get(word)
        return self._bits(self._places.get(word, ())) if kept is None else kept

    def share(self, words: Iterable[str]) -> bool:
        """Whether any of the words is in the list."""
        return not self._places.keys().isdisjoint(words)

    def _bits(self, places: Sequence[int]) -> int:
        if len(places) <= 2:
            return sum(1 << at for at in places)
        bits = bytearray(self._bytes)
        for at in places:
            bits[at // 8] |= 1 << at % 8
        return int.from_bytes(bits, "little")


def _next_row(row: int, matches: int, width: int) -> int:
    """One row of the table L of lengths from the row above.

    A row is kept as bits, 0 where L[i,j] is one more than L[i,j-1] (Crochemore et al., "A fast and
    practical bit-vector algorithm for the longest common subsequence problem", 2001).
    """
    return ((row + (row & matches)) | (row & ~matches)) & _all_ones(width)


def _steps(row: int, words_N: Sequence[str], matches: WordPlaces, width: int) -> list[int]:
    rows = []
    for word in words_N:
        row = _next_row(row, matches.of(word), width)
        rows.append(row)
    return rows
