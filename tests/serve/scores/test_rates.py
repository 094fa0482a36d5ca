"""General measures, by hand."""

from __future__ import annotations

import math
from collections.abc import Container

import numpy as np
import pytest

from serve.scores.measured import Measured
from serve.scores.rates import general_measures
from serve.scores.rows import ScoredRow
from serve.scores.segmentation import Words

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def measured(rows: list[ScoredRow], training: Container[str] | None = None) -> dict[str, Measured]:
    return {one.names[0]: one for one in general_measures(rows, Words(), training)}


def test_the_stop_rate_is_of_the_rows_whose_end_is_known() -> None:
    ends = ["stop", "length", None, "stop", "error"]
    found = measured([ScoredRow("a", ("a",), end) for end in ends])["stop_rate"]
    assert found.values_M == [2 / 4]
    assert "4 of 5 rows" in found.signature
    np.testing.assert_array_equal(found.row_values_NM[:, 0], [1, 0, math.nan, 1, 0])
    assert "stop_rate" not in measured([ScoredRow("a", ("a",))])


def test_an_exact_match_is_with_any_reference_but_for_white_space_around() -> None:
    rows = [
        ScoredRow(" 裙子\n", ("上衣", "裙子 ")),
        ScoredRow("裙子", ("裙 子",)),
        ScoredRow("A", ("a",)),
        ScoredRow(" ", ("",)),
    ]
    assert measured(rows)["exact_match"].values_M == [1 / 4]


def test_distinct_n_counts_different_n_grams_of_all_answers() -> None:
    # Words a b a and a b: 2 different words of 5, and the pairs ab, ba, ab: 2 of 3.
    rows = [ScoredRow("a b a", ("x",)), ScoredRow("a b", ("x",))]
    found = measured(rows)
    assert found["distinct-1"].values_M == [2 / 5]
    assert found["distinct-2"].values_M == [2 / 3]
    # Alone: of the first answer half of a and half of b, in three words.
    assert found["distinct-1"].row_values_NM[:, 0] == pytest.approx([1 / 3, 1 / 2])
    assert found["distinct-2"].row_values_NM[:, 0] == pytest.approx([1.5 / 2, 0.5])
    assert np.isnan(measured([ScoredRow("", ("x",))])["distinct-1"].values_M).all()


def test_the_length_ratio_is_of_sums_and_of_the_closest_reference() -> None:
    rows = [
        ScoredRow("四个 字的", ("两字", "五 个字吧吧", "十个字十个字十个字十")),
        ScoredRow("", ("两字",)),
    ]
    found = measured(rows)["length_ratio"]
    assert found.values_M == [4 / (5 + 2)]
    assert found.higher_is_better == (None,)
    # Three and five are as close to four: the shorter counts.
    tied = measured([ScoredRow("四个字的", ("五个字吧吧", "三个字"))])
    assert tied["length_ratio"].values_M == [4 / 3]


def test_the_repetition_rate_is_the_share_of_4_grams_that_stood_before() -> None:
    # a b c d a b c d: abcd bcda cdab dabc abcd: one of five.
    rows = [ScoredRow("a b c d a b c d", ("x",)), ScoredRow("a b c", ("x",)), ScoredRow("", ("x",))]
    found = measured(rows)["repetition_rate"]
    np.testing.assert_allclose(found.row_values_NM[:, 0], [1 / 5, 0, 0])
    assert found.values_M == pytest.approx([1 / 15])
    assert found.higher_is_better == (False,)


def test_the_verbatim_share_is_of_answers_that_a_training_row_has() -> None:
    training = {"裙子很好看", "", "上衣"}
    answers = [" 裙子很好看", "裙子", "", "上衣"]
    rows = [ScoredRow(answer, ("x",)) for answer in answers]
    assert measured(rows, training)["verbatim_share"].values_M == [2 / 4]
    assert "verbatim_share" not in measured(rows)


def test_perplexity_is_over_all_known_tokens_of_the_references() -> None:
    rows = [
        ScoredRow("a", ("b",), reference_nll=2.0, reference_tokens=3),
        ScoredRow("a", ("b",), reference_nll=4.0, reference_tokens=1),
        ScoredRow("a", ("b",)),
        ScoredRow("a", ("",), reference_nll=0.0, reference_tokens=0),
    ]
    found = measured(rows)["perplexity"]
    assert found.values_M == pytest.approx([math.exp(6 / 4)])
    assert found.row_values_NM[1, 0] == pytest.approx(math.exp(4))
    assert np.isnan(found.row_values_NM[2:]).all()
    assert "2 of 4 rows" in found.signature
    assert found.higher_is_better == (False,)
    assert "perplexity" not in measured(rows[2:])
    # A loss beyond a float's range is told as not finite, without a warning.
    endless = measured([ScoredRow("a", ("b",), reference_nll=1e6, reference_tokens=1)])
    assert endless["perplexity"].values_M == [math.inf]
    assert endless["perplexity"].as_dict() == {"perplexity": None}
