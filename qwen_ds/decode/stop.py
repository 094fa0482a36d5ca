"""The one rule for the end of an answer: stop tokens, stop sequences, and where they cut it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class StopRule:
    """Ids and token sequences that end a row. The answer is what precedes the first of them.

    ValueError for a sequence without tokens, which would end every answer at once.
    """

    ids: tuple[int, ...] = ()
    sequences: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for sequence in self.sequences:
            if not sequence or any(not isinstance(i, int) or i < 0 for i in sequence):
                came = f"a stop sequence is {list(sequence)!r}"
                raise ValueError(f"{came}; expected a non-empty list of token ids")

    def length_of_stop(self, ids: Sequence[int], end: int | None = None) -> int:
        """Length of the stop that ids[:end] ends with; 0 if it ends with none."""
        end = len(ids) if end is None else end
        if end and ids[end - 1] in self.ids:
            return 1
        lengths = (len(s) for s in self.sequences if tuple(ids[max(end - len(s), 0) : end]) == s)
        return max(lengths, default=0)

    def begun(self, ids: Sequence[int]) -> int:
        """Length of the longest end of `ids` that more tokens may make a stop; 1 for a stop id, and
        all of a sequence that is there."""
        longest = 1 if ids and ids[-1] in self.ids else 0
        for sequence in self.sequences:
            for length in range(min(len(sequence), len(ids)), longest, -1):
                if tuple(ids[-length:]) == sequence[:length]:
                    longest = length
                    break
        return longest

    def cut(self, ids: Sequence[int]) -> tuple[tuple[int, ...], FinishReason]:
        """The answer among the generated `ids`, without its stop, and how it ended."""
        for end in range(1, len(ids) + 1):
            if stop := self.length_of_stop(ids, end):
                return tuple(ids[: end - stop]), "stop"
        return tuple(ids), "length"
