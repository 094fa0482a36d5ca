"""The one rule for the end of an answer."""

from __future__ import annotations

import pytest

from qwen_ds.decode.stop import StopRule

RULE = StopRule(ids=(7, 8), sequences=((1, 2, 3), (3, 3)))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([5, 7, 8], ((5,), "stop")),
        ([8], ((), "stop")),
        ([5, 1, 2, 3, 7], ((5,), "stop")),
        ([1, 2, 1, 2, 3], ((1, 2), "stop")),
        ([2, 3], ((2, 3), "length")),
        ([], ((), "length")),
    ],
)
def test_an_answer_ends_before_its_first_stop(
    ids: list[int], expected: tuple[tuple[int, ...], str]
) -> None:
    assert RULE.cut(ids) == expected


def test_the_longest_stop_that_is_completed_is_cut_off() -> None:
    rule = StopRule(sequences=((3,), (1, 2, 3)))
    assert rule.length_of_stop([9, 1, 2, 3]) == 3
    assert rule.length_of_stop([2, 3]) == 1
    assert rule.length_of_stop([1, 2]) == rule.length_of_stop([]) == 0


@pytest.mark.parametrize("sequence", [(), (-1,), ("a",)])
def test_a_sequence_that_is_none_is_refused(sequence: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected a non-empty list of token ids"):
        StopRule(sequences=(sequence,))
